"""Real qemu programs for tests: create images, change them, and read them.

Every function runs one process and fails the test if that fails. `io` runs several commands in one qemu-io;
a compressed write must be the last of them, because otherwise qemu 7.2 corrupts the image.
"""

import json
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

QEMU_IMG = shutil.which("qemu-img")
QEMU_IO = shutil.which("qemu-io")

needs_qemu = pytest.mark.skipif(
    not (QEMU_IMG and QEMU_IO), reason="qemu-img and qemu-io (qemu-utils) are not installed"
)

_TIMEOUT = 120


def run(*command):
    """Run a program, and return its output as text. Fails with both of its streams."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=_TIMEOUT)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def create(path, size, **options):
    """Create a qcow2 image; options are qemu's: cluster_size=, compat="0.10", lazy_refcounts="on"."""
    extra = [f"{name}={value}" for name, value in options.items()]
    run(QEMU_IMG, "create", "-q", "-f", "qcow2", *_format_options(extra), path, size)
    return Path(path)


def write(offset, length, pattern, *, compressed=False):
    """Return a qemu-io command that fills a range with one byte value."""
    return f"write {'-c ' if compressed else ''}-P {pattern} {offset} {length}"


def zeroes(offset, length, *, unmap=False):
    """Return a qemu-io command that writes zeros without data; with `unmap` it frees the clusters."""
    return f"write -z {'-u ' if unmap else ''}{offset} {length}"


def discard(offset, length):
    """Return a qemu-io command that discards a range."""
    return f"discard {offset} {length}"


def io(path, *commands):
    """Run qemu-io commands in one process; only the last one can be a compressed write."""
    assert not any(" -c " in command for command in commands[:-1]), "nothing after a compressed write"
    arguments = [part for command in commands for part in ("-c", command)]
    output = run(QEMU_IO, "-f", "qcow2", "-d", "unmap", "-t", "unsafe", *arguments, path)
    assert not {"failed", "error"} & set(output.lower().replace(":", " ").split()), output
    return output


def write_file(path, offset, source):
    """Write the content of a file into the volume at an offset."""
    io(path, f"write -s {source} {offset} {Path(source).stat().st_size}")


def noise(path, offset, length, seed=None):
    """Write bytes that do not compress, the same for the same arguments."""
    chance = random.Random(f"{offset} {length}" if seed is None else seed)
    with tempfile.NamedTemporaryFile(dir=Path(path).parent) as piece:
        piece.write(chance.randbytes(length))
        piece.flush()
        write_file(path, offset, piece.name)


def snapshot_create(path, name):
    """Take an internal snapshot. No process must have the image open."""
    run(QEMU_IMG, "snapshot", "-c", name, path)


def snapshot_delete(path, name):
    """Delete an internal snapshot."""
    run(QEMU_IMG, "snapshot", "-d", name, path)


def snapshot_apply(path, name):
    """Revert the volume to an internal snapshot."""
    run(QEMU_IMG, "snapshot", "-a", name, path)


def resize(path, size):
    """Grow or shrink the volume."""
    run(QEMU_IMG, "resize", "-q", "-f", "qcow2", "--shrink", path, size)


def check(path):
    """Assert that `qemu-img check` finds neither corruption nor leaks, and return its report."""
    report = json.loads(run(QEMU_IMG, "check", "-f", "qcow2", "--output=json", path))
    found = {key: report[key] for key in ("corruptions", "leaks", "check-errors") if report.get(key)}
    assert not found, found
    return report


def info(path):
    """Return the output of `qemu-img info` as a dict."""
    return json.loads(run(QEMU_IMG, "info", "-f", "qcow2", "--output=json", path))


def convert(source, target, *, source_format="qcow2", target_format="qcow2", compress=False, **options):
    """Copy an image into a new one."""
    extra = [f"{name}={value}" for name, value in options.items()]
    flags = ["-c"] if compress else []
    run(QEMU_IMG, "convert", *flags, "-f", source_format, "-O", target_format, *_format_options(extra),
        source, target)  # fmt: skip
    return Path(target)


def compare(one, other, *, one_format="qcow2", other_format="raw"):
    """Assert that two images show a guest the same disk, sizes included."""
    output = run(QEMU_IMG, "compare", "-f", one_format, "-F", other_format, one, other)
    assert output == "Images are identical.\n"


def content(path, snapshot=None):
    """Return the whole volume as bytes, now or at an internal snapshot, as qemu reads it.

    A copy of the image is reverted to the snapshot: `convert -l` would read it at the volume's present size.
    """
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        if snapshot is not None:
            copy = Path(folder, "copy.qcow2")
            run("cp", "--sparse=always", path, copy)
            snapshot_apply(copy, snapshot)
            path = copy
        raw = convert(path, Path(folder, "raw"), target_format="raw")
        return raw.read_bytes()


def create_with_history(path, seed, size, snapshots=4, *, resizes=False, **options):
    """Create an image with a random history; return its internal snapshots' names, oldest first.

    The history has writes, zero writes of both kinds, discards and compressed writes between the snapshots,
    some aligned and some not, and with `resizes` new sizes. Sometimes a snapshot is deleted, or the volume is
    reverted to one. The same arguments give the same history.
    """
    chance = random.Random(seed)
    cluster = int(options.get("cluster_size", 65536))
    create(path, size, **options)
    names = []
    for number in range(snapshots):
        _change_randomly(path, chance, size, cluster)
        names.append(f"s{number}")
        snapshot_create(path, names[-1])
        if len(names) > 2 and chance.random() < 0.5:
            snapshot_delete(path, names.pop(chance.randrange(len(names))))
        if chance.random() < 0.2:
            snapshot_apply(path, chance.choice(names))
            size = info(path)["virtual-size"]
        if resizes:
            size = max(1 << 20, size + 512 * chance.randrange(-2000, 2000))
            resize(path, size)
    _change_randomly(path, chance, size, cluster)
    return names


def _change_randomly(path, chance, size, cluster):
    commands = []
    for _ in range(8):
        kind = chance.choice((write, write, write, zeroes, zeroes, discard))
        step = chance.choice((512, cluster))
        offset = chance.randrange(size // step) * step
        length = min(size - offset, max(step, chance.randrange(300 << 10) // step * step))
        extra = {"pattern": chance.randrange(1, 256)} if kind is write else {}
        if kind is zeroes:
            extra["unmap"] = chance.random() < 0.5
        commands.append(kind(offset, length, **extra))
    io(path, *commands)
    for _ in range(2):
        offset = chance.randrange(max(1, size // cluster)) * cluster
        length = min(cluster, size - offset)
        # qemu refuses a compressed write to an allocated cluster.
        io(path, discard(offset, length))
        io(path, write(offset, length, chance.randrange(1, 256), compressed=True))


def _format_options(extra):
    return ["-o", ",".join(extra)] if extra else []
