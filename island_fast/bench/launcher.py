"""A small process that starts a program, waits for it, and says what it cost; `measuring.run` starts it.

A program's peak memory counts from its fork, so that one started by a big process would seem as big; this
imports next to nothing, and is run with `-I -S`. It is told a file descriptor to write to, and the command.
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    """Run the command; writes "status wall-seconds processor-seconds peak-bytes" to the file descriptor."""
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
