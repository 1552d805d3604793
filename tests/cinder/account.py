"""The account that Cinder's services run under in tests: not root, and sudo for cinder-rootwrap alone."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import tests.cinder.leftovers as leftovers

ROOT = Path(__file__).resolve().parents[2]
_SUDOERS = Path("/etc/sudoers.d")
_PREFIX = "island-test-"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAMS = ("api", "backup", "manage", "scheduler", "volume")
NATIVE_THREADS = {"OS_CINDER_DISABLE_EVENTLET_PATCHING": "yes"}  # for services of Cinder from 29 on
_AS_ROOT = ("cinder-rootwrap", "privsep-helper", "island-loop")


class Account:
    """A user named after this process, its folders, and what it may run. Use as a context, as root.

    `home` is on a disk and holds everything but `run`, which is on a tmpfs. `bin` holds programs by the names
    that services know them by: they run the interpreter and the packages of these tests, even where only root
    may look (a virtual environment or an interpreter below /root), through mounts that the user can read.
    What is left of it in the end is ended and removed: processes, mounts, loop devices, files, the user.

    With `native_threads` its services run without eventlet, as those of Cinder 29 and later can.
    """

    def __init__(self, *, native_threads: bool = False) -> None:
        self._native_threads = native_threads
        self.name = f"{_PREFIX}{os.getpid()}"
        self.home, self.run = Path(), Path()
        self.ids = (0, 0)
        self._mounts = Path()
        self._mounted: list[Path] = []

    @property
    def bin(self) -> Path:
        return self.home / "bin"

    @property
    def rootwrap(self) -> Path:
        """The rootwrap.conf that sudo lets the user run cinder-rootwrap with."""
        return self.home / "etc" / "rootwrap.conf"

    @property
    def cinder_etc(self) -> Path:
        """The folder of the files that come with Cinder for its configuration."""
        return self._etc

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        folders = [folder for folder in (self.home, self.run) if folder != Path()]
        with ExitStack() as last_first:  # each step is taken, even if one before it fails
            if self.ids[0]:
                # Processes that were killed may be unable to go for lack of someone who waits for them.
                command = ["userdel", "--force", self.name]
                last_first.callback(subprocess.run, command, check=True, capture_output=True)
            for folder in folders:
                last_first.callback(leftovers.remove, folder)
            if self._mounts != Path():
                last_first.callback(self._mounts.rmdir)
            for place in self._mounted:
                last_first.callback(place.rmdir)
                # A process that was killed may hold it for a moment longer.
                last_first.callback(subprocess.run, ["umount", "--lazy", place], check=True)
            last_first.callback(leftovers.clear, self.ids[0], folders)
            (_SUDOERS / self.name).unlink(missing_ok=True)

    def environment(self) -> dict[str, str]:
        """What services have in their environment."""
        return {
            "PATH": f"{self.bin}:{_PATH}",
            "HOME": str(self.home / "home"),
            "PYTHONPATH": self._packages,
            "LC_ALL": "C.UTF-8",
            **(NATIVE_THREADS if self._native_threads else {}),
        }

    def call(self, *command: str | Path) -> str:
        """What a program of `bin` prints, run as the user; fails if it does."""
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            env=self.environment(),
            user=self.ids[0],
            group=self.ids[1],
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def folder(self, name: str) -> Path:
        """A folder of the user's, below home, that nobody else can look into."""
        place = self.home
        for part in Path(name).parts:
            place /= part
            if not place.exists():
                place.mkdir(0o700)
                os.chown(place, *self.ids)
        return place

    # -- making it

    def _make(self) -> None:
        _forget_dead_accounts()
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", self.name]
        subprocess.run(command, check=True, capture_output=True)
        entry = pwd.getpwnam(self.name)
        self.ids = (entry.pw_uid, entry.pw_gid)
        self.home = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_open_folder()))
        self.run = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/dev/shm"))
        self._mounts = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/run"))
        for place in (self.home, self.run, self._mounts, self.bin, self.rootwrap.parent):
            place.mkdir(exist_ok=True)
            place.chmod(0o755)
        os.chown(self.run, *self.ids)
        self.folder("home")
        self._write_programs()
        self._write_rootwrap()
        self._write_sudoers()

    def _write_programs(self) -> None:
        base = self._reachable(Path(sys.base_prefix).resolve(), "python")
        interpreter = base / Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())
        environment = Path(sys.prefix).resolve()
        reachable = self._reachable(environment, "environment")
        packages = Path(sysconfig.get_path("purelib")).resolve().relative_to(environment)
        self._etc = reachable / "etc" / "cinder"
        ours = self.home / "lib"
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "island_fast", ours / "island_fast", ignore=unwanted)
        for name in ("plain_driver.py", "serve.py"):
            shutil.copy(Path(__file__).with_name(name), ours)
        subprocess.run(["chmod", "-R", "u=rwX,go=rX", ours], check=True)
        self._packages = f"{ours}:{reachable / packages}"
        libraries = f" LD_LIBRARY_PATH='{base}/lib'" if base in self._mounted else ""
        programs = {"python": "", **{name: f"'{reachable}/bin/{name}'" for name in _AS_ROOT}}
        programs |= {f"cinder-{name}": f"'{ours}/serve.py' {name}" for name in _PROGRAMS}
        for name, words in programs.items():
            text = (
                "#!/bin/sh\n"
                "export PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore\n"
                f"export PYTHONPATH='{self._packages}'{libraries}\n"
                f"exec '{interpreter}' {words} \"$@\"\n"
            )
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def _reachable(self, folder: Path, name: str) -> Path:
        """`folder` if everyone can go there, else a place where it can be read, too."""
        if all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents)):
            return folder
        place = self._mounts / name
        place.mkdir()
        subprocess.run(["mount", "--bind", "-o", "ro", folder, place], check=True)
        self._mounted.append(place)
        assert place.stat().st_mode & 0o001, f"{folder} is closed to other users: make it with umask 022"
        return place

    def _write_rootwrap(self) -> None:
        """Cinder's filters, with this folder in the place of /etc, and ours."""
        filters = self.rootwrap.parent / "rootwrap.d"
        filters.mkdir()
        theirs = Path(sys.prefix) / "etc" / "cinder" / "rootwrap.d" / "volume.filters"
        (filters / "volume.filters").write_text(theirs.read_text().replace("/etc/(?!", f"{self.home}/(?!"))
        ours = self.home / "lib" / "island_fast" / "etc" / "rootwrap.d"
        self.rootwrap.write_text(
            "[DEFAULT]\n"
            f"filters_path={filters},{ours}\n"
            f"exec_dirs={self.bin},{_PATH.replace(':', ',')}\n"
            "use_syslog=False\n"
        )

    def _write_sudoers(self) -> None:
        command = f"{self.bin}/cinder-rootwrap {self.rootwrap} *"
        text = (
            f'Defaults:{self.name} secure_path="{self.bin}:{_PATH}", !requiretty, !use_pty, !syslog\n'
            f"{self.name} ALL=(root) NOPASSWD: {command}\n"
        )
        rules = self.home / "sudoers"
        rules.write_text(text)
        rules.chmod(0o440)
        subprocess.run(["visudo", "-c", "-q", "-f", rules], check=True)
        shutil.copyfile(rules, _SUDOERS / f"{self.name}.new~")  # sudo reads no name with a tilde
        (_SUDOERS / f"{self.name}.new~").chmod(0o440)
        (_SUDOERS / f"{self.name}.new~").rename(_SUDOERS / self.name)


def _forget_dead_accounts() -> None:
    """Remove users, and their rights, of test runs that were killed."""
    for name in [entry.pw_name for entry in pwd.getpwall() if entry.pw_name.startswith(_PREFIX)]:
        pid = name.removeprefix(_PREFIX)  # in a namespace of its own, each run has the same one
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            (_SUDOERS / name).unlink(missing_ok=True)
            subprocess.run(["userdel", name], check=False, capture_output=True)


def _open_folder() -> str:
    """A folder on a disk that every user can reach."""
    for folder in (tempfile.gettempdir(), "/var/tmp", "/tmp"):
        places = (Path(folder).resolve(), *Path(folder).resolve().parents)
        if all(place.stat().st_mode & 0o001 for place in places):
            return folder
    raise AssertionError("no folder for temporary files is open to other users")
