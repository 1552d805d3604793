"""Runs in the virtual machine of test_nbd.py: tests of volumes that are attached, on a kernel that has NBD.

Each argument is `MODULE::TEST [USER]`. Without pytest's own start, which takes a minute in an emulated
machine. Each test gives one line on standard output: a mark, and JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback

import pytest

from tests.live.conftest import host_of

MARK = "island-live "


def main() -> None:
    for argument in sys.argv[1:]:
        name, _, user = argument.partition(" ")
        module, _, test = name.partition("::")
        begun, complaint = time.monotonic(), ""
        try:
            with contextlib.contextmanager(host_of)(user or "root") as host:
                getattr(importlib.import_module(f"tests.live.{module}"), test)(host)
        except (Exception, pytest.fail.Exception, pytest.skip.Exception):  # noqa: BLE001 - it is told
            complaint = traceback.format_exc()
        took = round(time.monotonic() - begun, 1)
        print(MARK + json.dumps({"test": argument, "failed": complaint, "seconds": took}), flush=True)
    os._exit(0)  # whatever a failed test left must not keep the machine up


if __name__ == "__main__":
    main()
