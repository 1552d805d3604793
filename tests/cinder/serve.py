"""A program of Cinder's, on SQLite as several processes can use it: `python serve.py NAME ARGUMENT...`.

oslo.db begins transactions without the lock for writing. One that has read and then writes fails at once,
whatever the timeout, when another has written in between ("database is locked", HTTP 500). Here each takes
the lock when it begins, and waits for it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def _lock_at_once(
    connection: Any, cursor: Any, statement: str, parameters: Any, *_: object
) -> tuple[str, Any]:
    return ("BEGIN IMMEDIATE" if statement == "BEGIN" else statement), parameters


def main() -> None:
    name = sys.argv[1]
    module = importlib.import_module(f"cinder.cmd.{name}")  # before all others: it has eventlet patch them
    from sqlalchemy import Engine, event

    event.listen(Engine, "before_cursor_execute", _lock_at_once, retval=True)
    sys.argv = [f"cinder-{name}", *sys.argv[2:]]
    sys.exit(module.main())


if __name__ == "__main__":
    main()
