"""Unpack today's restic, Borg 1 and Borg 2 into build/peers; the bench looks in build/peers/bin first.

    python -m scripts.peers [SUITE]

They are the packages of Debian's SUITE (sid), with everything down to the C library, so that they run on an
older system: 300 MB. Nothing is installed, and root is not needed. Needs apt-get, and dpkg-deb. What is there
already is kept until `make clean`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.versions import TREE, mirror

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PACKAGES = ("restic", "borgbackup", "borgbackup2", "python3-borgstore", "python3-requests")
PROGRAMS = {"restic": "", "borg": "", "borg2": "usr/lib/borgbackup2", "borgstore-server-rest": ""}
"""The folder that Python has to look in first, for each."""


def main() -> None:
    """Unpack the packages if they are not there; exit with a sentence if they cannot be had."""
    suite = sys.argv[1] if len(sys.argv) > 1 else "sid"
    top = TREE / "build/peers"
    if (top / "bin").is_dir():
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb") and KEYS.exists()):
        sys.exit("today's restic and borg come from Debian's packages, and this is not Debian")
    shutil.rmtree(top, ignore_errors=True)
    print(f"unpacking restic and borg of Debian's {suite} into {top.relative_to(TREE)}", file=sys.stderr)
    try:
        fetch(suite, top / "packages")
        for package in sorted((top / "packages/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, top / "root"], check=True)
        shutil.rmtree(top / "packages")
        write_programs(top)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed, so restic and borg are not unpacked: {error.stderr or ''}")


def fetch(suite: str, folder: Path) -> None:
    """Download the packages and all that they need, with lists and settings of apt that are this folder's."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={KEYS}] {mirror()} {suite} main\n")
    settings = {
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder,
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::status": "/dev/null",  # nothing is installed, so that everything comes from there
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    for words in (["update"], ["install", "--yes", "--download-only", *PACKAGES]):
        command = ["apt-get", "-qq", *options, *words]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)


def write_programs(top: Path) -> None:
    """Write bin/NAME for each program: it starts the one in root with the loader and libraries from there."""
    root = top / "root"
    loader = next((root / "usr/lib64").glob("ld-linux*"), None) or next((root / "usr/lib").glob("ld-linux*"))
    (library,) = (path.parent for path in (root / "usr/lib").glob("*/libc.so.6"))
    start = [loader, "--library-path", library]
    python = [*start, root / "usr/bin/python3", "-s"]
    # Compiled now, as an installed package would be.
    folders = [*root.glob("usr/lib/python3*"), root / "usr/lib/borgbackup2"]
    environment = {**os.environ, "PYTHONHOME": str(root / "usr"), "PYTHONDONTWRITEBYTECODE": ""}
    command = [*python, "-m", "compileall", "-q", *folders]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    made = top / "bin.new"
    made.mkdir()
    for name, first in PROGRAMS.items():
        program = root / "usr/bin" / name
        if program.read_bytes().startswith(b"\x7fELF"):
            words = ["exec", *start, program]
        else:
            folder = root / first if first else ""
            words = ["exec", "env", f"PYTHONHOME={root / 'usr'}", f"PYTHONPATH={folder}", *python, program]
        (made / name).write_text(f'#!/bin/sh\n{shlex.join(map(str, words))} "$@"\n')
        (made / name).chmod(0o755)
    made.rename(top / "bin")


if __name__ == "__main__":
    main()
