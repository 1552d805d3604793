"""`python -m island_fast` is the command `island`."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run this process's command line and return the exit code. Ctrl-C works from the first moment."""
    gc.set_threshold(50_000)  # importing makes much and drops nothing: collecting garbage then finds none
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy starts threads that nothing here uses
    try:
        from island_fast.cli.main import main as island
    except KeyboardInterrupt:  # importing takes a while, and signals are not handled yet
        print("island: interrupted; nothing was changed", file=sys.stderr)
        return 1
    return island()


if __name__ == "__main__":
    sys.exit(main())
