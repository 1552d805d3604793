"""Make a root folder with the Ceph of another suite of Debian, for `make ceph SUITE=trixie`; print its path.

    scripts/ceph_suite.py SUITE

Needs root and debootstrap. The folder is build/ceph/SUITE, of 900 MB; it is made once and kept until `make
clean`. Only Ceph's programs run in it: tests/support/ceph_server.py starts them there. Packages come from
where this machine's apt takes Debian's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
PACKAGES = ("ceph-common", "ceph-mon", "ceph-osd", "radosgw")


def main() -> None:
    """Make the folder if it is not whole, and print its path."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    top = TREE / "build/ceph" / sys.argv[1]
    if not (top / "usr/bin/radosgw").exists():
        make_root(sys.argv[1], top)
    print(top)


def make_root(suite: str, top: Path) -> None:
    """Install a minimal system and Ceph in `top`; what was left of one half made is removed."""
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    run("debootstrap", "--variant=minbase", suite, str(top), find_mirror())
    for name in ("resolv.conf", "hosts"):
        shutil.copy(f"/etc/{name}", top / "etc" / name)
    settings = output("apt-config", "dump", "--no-empty", "Acquire")
    (top / "etc/apt/apt.conf.d/00machine").write_text(settings)
    (top / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")  # start no service
    (top / "usr/sbin/policy-rc.d").chmod(0o755)
    mounts = 'mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; exec chroot "$0" "$@"'
    install = "apt-get -qq update && apt-get -qq -y --no-install-recommends install"
    words = f"DEBIAN_FRONTEND=noninteractive; export DEBIAN_FRONTEND; {install} {' '.join(PACKAGES)}"
    run("unshare", "--mount", "sh", "-c", mounts, str(top), "sh", "-c", words)


def find_mirror() -> str:
    """Return the address from which this machine's apt takes Debian's packages."""
    listed = output("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages")
    for line in listed.splitlines():
        origin, _, address = line.partition(" ")
        if origin == "Debian":
            return address
    sys.exit("apt on this machine has no source of Debian's packages; run apt-get update")


def run(*command: str) -> None:
    """Run a program that must succeed; what it prints goes to standard error."""
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        sys.exit(f"{command[0]} failed")


def output(*command: str) -> str:
    """Run a program and return its standard output."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
