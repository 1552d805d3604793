"""Make a root folder with the Ceph of another suite of Debian, for `make ceph SUITE=trixie`; print its path.

    python -m scripts.ceph_suite SUITE

Needs root and debootstrap. The folder is build/ceph/SUITE, of 900 MB; it is made once and kept until `make
clean`. Only Ceph's programs run in it: tests/support/ceph_server.py starts them there. Packages come from
where this machine's apt takes Debian's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.versions import TREE, copy_settings, mirror

PACKAGES = ("ceph-common", "ceph-mon", "ceph-osd", "radosgw")

# Runs in a mount namespace, which ends with its process: nothing of it has to be undone.
ENTER = 'mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; exec chroot "$0" "$@"'
INSTALL = "apt-get -qq update && apt-get -qq -y --no-install-recommends install"


def main() -> None:
    """Make the folder if it is not whole, and print its path."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if os.geteuid() != 0:
        sys.exit("a chroot needs root")
    top = TREE / "build/ceph" / sys.argv[1]
    if not (top / "usr/bin/radosgw").exists():
        make_root(sys.argv[1], top)
    print(top)


def make_root(suite: str, top: Path) -> None:
    """Install a minimal system and Ceph in `top`; what was left of one half made is removed."""
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    subprocess.run(["debootstrap", "--variant=minbase", suite, top, mirror()], stdout=sys.stderr, check=True)
    copy_settings(top)
    services = top / "usr/sbin/policy-rc.d"
    services.write_text("#!/bin/sh\nexit 101\n")  # none is started
    services.chmod(0o755)
    words = ["sh", "-c", f"export DEBIAN_FRONTEND=noninteractive; {INSTALL} {' '.join(PACKAGES)}"]
    subprocess.run(["unshare", "--mount", "sh", "-c", ENTER, top, *words], stdout=sys.stderr, check=True)


if __name__ == "__main__":
    main()
