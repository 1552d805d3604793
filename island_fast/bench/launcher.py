"""Start a program, wait for it, and report what it cost; `timing.run` starts this as a small process.

    python -I -S launcher.py DESCRIPTOR COMMAND...

The kernel counts a program's peak memory from its fork, so a program that a large process starts would seem
as large. This process stays small: it imports next to nothing.
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    """Run the command; write "status wall-seconds processor-seconds peak-bytes" to the file descriptor."""
    answer, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(answer, False)
    start = time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, used = os.wait4(pid, 0)
    wall = time.monotonic() - start
    code = os.waitstatus_to_exitcode(status)
    text = f"{code} {wall} {used.ru_utime + used.ru_stime} {used.ru_maxrss << 10}"
    os.write(answer, text.encode())


if __name__ == "__main__":
    main()
