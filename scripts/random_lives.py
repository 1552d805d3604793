"""Run random lives of a repository with crashes and faults, in rounds, each with another seed.

    scripts/random_lives.py SECONDS              run rounds with new seeds until the time is over
    scripts/random_lives.py --seed N             run the round with seed N again
    scripts/random_lives.py --seed N --shrink    and find the shortest life that fails in the same way

A life is a random sequence of commands, crashes and faults. tests/faults/machine/machine.py has them, and
what must hold after each step. On a failure the script prints the life, its seed, and how to run it again,
and the exit code is 1. At the end it prints how often each thing happened.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from random import SystemRandom

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from tests.faults.machine.rounds import (  # noqa: E402 (found in the tree that this file is in)
    beginnings,
    interruptions,
    march,
    never,
    old_states,
    refusals,
    round_of,
    table,
)


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "seconds", type=float, nargs="?", default=0.0, help="how long to run, in seconds (0: one round)"
    )
    parser.add_argument("--seed", type=int, help="run only the round with this seed")
    parser.add_argument("--lives", type=int, default=30, help="number of lives in a round (30)")
    parser.add_argument("--shrink", action="store_true", help="find the shortest life that fails")
    options = parser.parse_args()
    end, rounds = time.monotonic() + options.seconds, 0
    while True:
        seed = SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
        print(f"seed {seed}", flush=True)
        try:
            if not rounds:
                march()
                interruptions()
                refusals()
                old_states()
                beginnings()
            round_of(seed, options.lives, shrink=options.shrink)
            round_of(seed, options.lives // 3, shrink=options.shrink, refuses=False)
        except Exception:  # noqa: BLE001 (every error is a finding)
            traceback.print_exc()
            print(f"FOUND: {describe_error()}\nrun it again: MACHINE_SEED={seed} make machine")
            return 1
        rounds += 1
        if options.seed is not None or time.monotonic() >= end:
            break
    print(table())
    print(f"{rounds} rounds of {options.lives} lives, nothing found; never happened: {never() or 'nothing'}")
    return 0


def describe_error() -> str:
    """Return the exception that is being handled as one line."""
    error = sys.exc_info()[1]
    text = str(error).strip() or "an assertion"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


if __name__ == "__main__":
    sys.exit(main())
