"""Run the README's two commands, `make demo` and `make test`, on another suite of Debian, in a chroot.

    scripts/versions.py SUITE [WORD...]            a suite is trixie or sid; words are for pytest: tests/unit
    scripts/versions.py SUITE --target TARGET      make this target there instead, such as wheels
    scripts/versions.py SUITE --with REQUIREMENTS  test with these instead: "cinder==26.* oslo.utils<9"

Needs root and debootstrap. The chroot is build/versions/SUITE, of 4 GiB; it is made once and kept, with the
packages and the virtual environment in it, until `make clean`. What runs there is a clone of the last commit
with the changes to its files, not files that git does not know. Packages come from where this machine's apt
and pip take theirs.

All of it runs in namespaces of its own: when this ends, the kernel has unmounted everything and ended every
process. Tests see no network but loopback.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
OTHERS = ".others"  # in a virtual environment in which not everything is what `make` would install
CLONE = "srv/island"  # below the chroot; others than root may read it

# What the README asks for, and what this machine's place as a checkout and a sandbox asks for.
PACKAGES = ("make", "gcc", "libc6-dev", "python3", "ca-certificates", "git", "man-db", "procps")

# Runs in new mount, process and network namespaces: the chroot becomes the root of all mounts, as systemd
# and virtiofsd need it. Control groups are those of version 2, the only ones for newer systemd (262 is one).
# Nothing of it has to be undone.
ENTER = """
set -e
mount --make-rprivate /
mount --bind "$TOP" "$TOP"
cd "$TOP"
mount --rbind /dev dev
mount --rbind /sys sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t proc proc proc
mount -t tmpfs tmpfs dev/shm
mount -t tmpfs tmpfs run
mkdir -p -m 1777 run/lock .outside
find tmp -mindepth 1 -delete
[ -n "$NETWORK" ] || ip link set lo up
pivot_root . .outside
umount -l /.outside
rmdir /.outside
cd "$CLONE"
exec "$@"
"""


def main() -> None:
    """Make the chroot if need be, and run both commands in it; exit with the code of the one that fails.

    With words for pytest, the demo is left out.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("suite")
    parser.add_argument("--target", default="test")
    parser.add_argument("--with", dest="other")
    chosen, words = parser.parse_known_args()
    suite = chosen.suite
    if os.geteuid() != 0:
        sys.exit("a chroot needs root")
    top = TREE / "build/versions" / suite
    top.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(top.parent / f"{suite}.lock", os.O_CREAT | os.O_RDWR)  # released when this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"another process uses {top}; wait for its end")
    if not (top / CLONE).is_dir():
        make_chroot(suite, top)
    copy_settings(top)
    commit = clone(top / CLONE)
    forget_others(top / CLONE / ".venv")
    if chosen.target != "test":
        run(top, ["make", chosen.target], network=True)
        return
    print(f"{suite}, commit {commit[:12]}", flush=True)
    if not words:
        run(top, ["make", "demo"], network=True)
    run(top, ["make", "ready"], network=True)
    if chosen.other:
        (top / CLONE / ".venv" / OTHERS).touch()
        run(top, [".venv/bin/pip", "install", "-q", "--upgrade", *chosen.other.split()], network=True)
    report_versions(top)
    run(top, ["make", "test", f"TESTS={' '.join(words)}"])


def forget_others(environment: Path) -> None:
    """Have `make` install again what an earlier run has replaced."""
    if (environment / OTHERS).exists():
        (environment / ".tested").unlink(missing_ok=True)
        (environment / OTHERS).unlink()


def make_chroot(suite: str, top: Path) -> None:
    """Make a minimal system with what the README asks for; what was left of one half made is removed."""
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    include = f"--include={','.join(PACKAGES)}"
    spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    subprocess.run([*spaces, "debootstrap", "--variant=minbase", include, suite, top, mirror()], check=True)
    (top / CLONE).mkdir(parents=True)


def mirror() -> str:
    """Return the address from which this machine's apt takes Debian's packages."""
    listed = output("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages")
    for line in listed.splitlines():
        origin, _, address = line.partition(" ")
        if origin == "Debian":
            return address
    sys.exit("apt on this machine has no source of Debian's packages; run apt-get update")


def copy_settings(top: Path) -> None:
    """Let the chroot reach what this machine reaches, by the same names and proxies."""
    for name in ("resolv.conf", "hosts"):
        shutil.copy(f"/etc/{name}", top / "etc" / name)
    (top / "etc/apt/apt.conf.d/00machine").write_text(output("apt-config", "dump", "--no-empty", "Acquire"))


def pip_settings(top: Path) -> dict[str, str]:
    """Return variables for pip in the chroot, from this machine's own configuration of it."""
    found = {}
    for line in output(sys.executable, "-m", "pip", "config", "list").splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("index-url", "proxy", "trusted-host", "cert"):
            found[name] = value.strip("'")
    if "cert" in found:
        shutil.copy(found["cert"], top / "etc/ssl/machine.pem")
        found["cert"] = "/etc/ssl/machine.pem"
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in found.items()}


def clone(target: Path) -> str:
    """Check out the last commit and the changes to its files, and return the commit of both."""
    author = ["-c", "user.name=versions", "-c", "user.email=versions@localhost"]
    commit = output("git", *author, "stash", "create").strip() or output("git", "rev-parse", "HEAD").strip()
    subprocess.run(["git", "init", "-q", target], check=True)
    subprocess.run(["git", "push", "-q", "-f", target, f"{commit}:refs/versions/now"], cwd=TREE, check=True)
    subprocess.run(["git", "checkout", "-q", "-f", "--detach", commit], cwd=target, check=True)
    return commit


def run(top: Path, command: Sequence[str], *, network: bool = False) -> None:
    """Run a command in the clone, as root, with a network or with loopback alone; exit if it fails."""
    spaces = ["--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TOP": str(top),
        "CLONE": f"/{CLONE}",
        "NETWORK": "yes" if network else "",
        **(pip_settings(top) if network else {}),
    }
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run(
        ["unshare", *spaces, "sh", "-c", ENTER, "sh", *command], env=environment, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)


def report_versions(top: Path) -> None:
    """Print what the suite brought."""
    packages = ["qemu-utils", "libvirt-daemon", "systemd", "libfuse3-3", "libfuse3-4"]
    form = "-f=${Package} ${Version}\n"
    listed = subprocess.run(
        ["chroot", top, "dpkg-query", "-W", form, *packages], capture_output=True, text=True, check=False
    )
    python = output("chroot", str(top), "python3", "-V")
    print(f"{python}kernel {os.uname().release}\n{listed.stdout}", flush=True)


def output(*command: str) -> str:
    """Run a program in the tree and return its standard output."""
    return subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
