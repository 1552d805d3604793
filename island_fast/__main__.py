"""`python -m island_fast` is the command `island`."""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run this process's command line; returns the exit code. Ctrl-C is heeded from the first moment."""
    gc.set_threshold(50_000)  # importing makes much and drops nothing: looking for garbage there is in vain
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy starts threads that nobody here needs
    try:
        from island_fast.cli.main import main as island
    except KeyboardInterrupt:  # importing takes a while, and signals are not yet taken care of
        print("island: interrupted; nothing was changed", file=sys.stderr)
        return 1
    return island()


if __name__ == "__main__":
    sys.exit(main())
