"""`python -m island_fast` is the command `island`.

With ISLAND_ENVIRONMENT=stdin, more variables are read from standard input, as one JSON object: what is in a
process's environment when it starts can be read in /proc as long as it lives.
"""

from __future__ import annotations

import gc
import json
import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run this process's command line and return the exit code. Ctrl-C works from the first moment."""
    gc.set_threshold(50_000)  # importing makes much and drops nothing: collecting garbage then finds none
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy starts threads that nothing here uses
    if os.environ.pop("ISLAND_ENVIRONMENT", "") == "stdin":
        os.environ.update(json.load(sys.stdin))
    try:
        from island_fast.cli.main import main as island
    except KeyboardInterrupt:  # importing takes a while, and signals are not handled yet
        print("island: interrupted; nothing was changed", file=sys.stderr)
        return 1
    return island()


if __name__ == "__main__":
    sys.exit(main())
