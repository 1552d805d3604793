"""Run cinderlib's own functional suite on the Cinder driver, with a directory as the repository.

    scripts/cinderlib_suite.py

Needs root, for loop devices. cinderlib asks for Cinder 23; here it gets the Cinder of this environment, so it
is installed without what it asks for, in build/cinderlib. Its suite first opens a database in memory, by a
module that Cinder 29 does not have, and then does without it; here it does without it from the start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE))

from island_fast.cinder.attach.exports import Exports  # noqa: E402
from island_fast.qemu.programs import run_program  # noqa: E402

VERSION = "5.2.0"
TESTS = 17  # in that version
SECTION = "island"


def main() -> None:
    """Run the suite; exit with 1 unless all its tests pass."""
    if os.geteuid() != 0:
        sys.exit("loop devices need root")
    install()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as run:
        # `env`, which runs a program, is the helper by which cinderlib gets root's rights.
        os.environ |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CL_FTEST_CFG": str(write_settings(Path(folder), Path(run))),
            "CL_FTEST_ROOT_HELPER": "env",
        }
        os.chdir(folder)  # cinderlib's state is in the working directory
        try:
            result = run_suite()
        finally:
            end_daemons(Path(run) / SECTION)
            os.chdir(TREE)
    sys.exit(not (result.wasSuccessful() and not result.skipped and result.testsRun == TESTS))


def install() -> None:
    """Install cinderlib into build/cinderlib, if it is not there, and let it be imported."""
    target = TREE / "build/cinderlib" / VERSION
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", target, f"cinderlib=={VERSION}"], check=True)
    sys.path.append(str(target))


def write_settings(folder: Path, run: Path) -> Path:
    """Write the configuration of the suite, and return its path. `run` is on a tmpfs."""
    backend = {
        "volume_backend_name": SECTION,
        "volume_driver": "island_fast.driver.IslandDriver",
        "island_repository": str(folder / "repository"),
        "island_volumes_dir": str(folder / "volumes"),
        "island_state_dir": str(folder / "state"),
        "island_run_dir": str(run),
    }
    path = folder / "settings.yaml"  # which JSON is, too
    path.write_text(json.dumps({"logs": False, "backends": [backend]}))
    return path


def run_suite() -> unittest.TestResult:
    """Run all tests of the suite, without a database."""
    warnings.simplefilter("ignore")
    import cinderlib

    set_up = cinderlib.setup

    def set_up_in_memory(**words: Any) -> None:  # noqa: ANN401
        set_up(**{**words, "persistence_config": {"storage": "memory"}})

    cinderlib.setup = set_up_in_memory
    tests = unittest.defaultTestLoader.loadTestsFromName("cinderlib.tests.functional.test_basic")
    return unittest.TextTestRunner(verbosity=2).run(tests)


def end_daemons(run: Path) -> None:
    """End what serves the volumes that a failed test has left."""
    exports = Exports(run / "daemons", run / "devices", run_program, "loop")
    for volume in exports.volumes():
        exports.stop(volume)


if __name__ == "__main__":
    main()
