"""`python -m island_fast` is the command `island`."""

import sys

from island_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
