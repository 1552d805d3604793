"""A small virtual machine with a Debian kernel that has NBD or VDUSE, and this machine's files to read.

No KVM is asked for. `scripts/install_packages guest` fetches the kernel of this machine's Debian, and
`scripts/install_packages vduse` that of Debian 13, which has VDUSE too. The guest sees this machine's root
file system by virtiofs, and writes to memory; what its processes write to the console is what comes back.
"""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
GUEST = ROOT / "build/guest"
VDUSE_GUEST = ROOT / "build/guest-vduse"
# where Debian's packages have them, by version
KERNELS = ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz")
BUSYBOX = ("bin/busybox", "usr/bin/busybox")
# Rust's, and QEMU's own of up to 7.2; Debian 13 has the former under both names
VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
# in the order in which they need each other
MODULES = (
    "virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci fuse virtiofs overlay nbd "
    "vhost_iotlb vdpa vduse virtio_vdpa virtio_blk irqbypass vhost vhost_vdpa"
)
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules/order); do
    options=; [ $m != nbd ] || options=max_part=0
    [ ! -e /modules/$m.ko ] || insmod /modules/$m.ko $options
done
mount -t virtiofs root /lower -o ro || poweroff -f
mount -t tmpfs tmpfs /upper; mkdir /upper/upper /upper/work
mount -t overlay overlay -o lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work /root
for d in proc sys dev; do mount --move /$d /root/$d; done
for d in dev/shm run tmp; do mkdir -p /root/$d; done
mount -t tmpfs tmpfs /root/run; mount -t tmpfs tmpfs /root/dev/shm
cp /job /root/run/job
chroot /root /bin/sh /run/job
poweroff -f
"""


def missing(guest: Path = GUEST) -> str:
    """What this machine lacks for the guest, in words; "" where it lacks nothing."""
    if os.geteuid() != 0:
        return "the guest reads this machine's files as root"
    if virtiofsd() is None:
        return "virtiofsd is not installed (scripts/install_packages guest)"
    for program in ("qemu-system-x86_64", "qemu-storage-daemon", "mke2fs", "cpio"):
        if shutil.which(program) is None:
            return f"{program} is not installed (scripts/install_packages daemon vm mkfs guest)"
    if kernel(guest) is None:
        item = "guest" if guest == GUEST else "vduse"
        return f"there is no kernel for the guest in {guest} (scripts/install_packages {item})"
    return ""


def kernel(guest: Path = GUEST) -> Path | None:
    found = [path for place in KERNELS for path in guest.glob(place)]
    return max(found, default=None)


def virtiofsd() -> str | None:
    return next((path for path in VIRTIOFSD if os.path.exists(path)), None)


def virtiofsd_options() -> list[str]:
    """What shares the root file system: QEMU's own virtiofsd has other options than Rust's.

    The latter announces mounts below the root by default; an overlay over them makes no folders (EREMOTE).
    """
    if virtiofsd() == VIRTIOFSD[1]:
        return ["-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot"]
    return ["--shared-dir=/", "--cache=always", "--sandbox=chroot", "--no-announce-submounts"]


def run(job: str, patience: float, guest: Path = GUEST) -> str:
    """Boot, run the shell script `job` as root, and return all that the console saw."""
    with tempfile.TemporaryDirectory(prefix="island-guest-") as name:
        folder = Path(name)
        ramdisk = make_ramdisk(folder, job, guest=guest)
        socket = folder / "files"
        words = [virtiofsd(), f"--socket-path={socket}", *virtiofsd_options()]
        with (folder / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as files:
            try:
                wait_for(socket, files, folder / "log")
                done = subprocess.run(
                    command(ramdisk, socket, guest),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=patience,
                )
            finally:
                files.terminate()
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout.decode(errors="replace")


def wait_for(socket: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while not socket.exists():
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(ramdisk: Path, socket: Path, guest: Path = GUEST) -> list[object]:
    machine = ["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768M"]
    memory = ["-object", "memory-backend-memfd,id=m,size=768M,share=on", "-numa", "node,memdev=m"]
    console = ["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
    boot = [
        "-kernel",
        kernel(guest),
        "-initrd",
        ramdisk,
        "-append",
        "console=ttyS0 quiet panic=-1 no_timer_check",
    ]
    share = ["-chardev", f"socket,id=c,path={socket}", "-device", "vhost-user-fs-pci,chardev=c,tag=root"]
    return ["qemu-system-x86_64", *machine, *memory, *console, *boot, *share]


def make_ramdisk(
    folder: Path, job: str, init: str = INIT, modules: str = MODULES, guest: Path = GUEST
) -> Path:
    top = folder / "ramdisk"
    for place in ("bin", "modules", "proc", "sys", "dev", "lower", "upper", "root"):
        (top / place).mkdir(parents=True)
    shutil.copy(next(guest / place for place in BUSYBOX if (guest / place).exists()), top / "bin")
    (top / "modules/order").write_text(modules)
    for module in guest.rglob("*.ko*"):
        name, _, packed = module.name.partition(".ko")
        if name in modules.split():
            assert packed in ("", ".xz"), module
            content = module.read_bytes()
            (top / f"modules/{name}.ko").write_bytes(lzma.decompress(content) if packed else content)
    (top / "init").write_text(init)
    (top / "init").chmod(0o755)
    (top / "job").write_text(job)
    made = folder / "ramdisk.cpio"
    with made.open("wb") as out:
        names = "\n".join(str(p.relative_to(top)) for p in [top, *sorted(top.rglob("*"))])
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), stdout=out, cwd=top, check=True
        )
    return made


def python_job(module: str, arguments: list[str], environment: dict[str, str]) -> str:
    """A job that runs a module of this tree, with this interpreter, and root's programs beside it."""
    lines = [
        "export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1",
        f"export PYTHONPATH={ROOT}",
        *[f"export {name}={value}" for name, value in environment.items()],
        *[line for kind in ("nbd", "vduse") for line in _root_program(kind)],
        f"cd {ROOT}",
        f"{sys.executable} -P -m {module} " + " ".join(f"'{word}'" for word in arguments),
        "",
    ]
    return "\n".join(lines)


def _root_program(kind: str) -> list[str]:
    """The lines that make the program of root's for one kind of device."""
    main = f"from island_fast.cinder.attach.{kind}_root import main; sys.exit(main())"
    program, path = f"/usr/local/bin/island-{kind}", f"import sys; sys.path.insert(0, '{ROOT}'); {main}"
    return [
        f"printf '%s\\n' '#!/bin/sh' >{program}",
        f'cat >>{program} <<\'end\'\nexec {sys.executable} -I -S -c "{path}" "$@"\nend',
        f"chmod +x {program}",
    ]
