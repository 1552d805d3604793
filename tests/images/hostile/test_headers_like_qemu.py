"""What qemu-img refuses in a header is refused here; bitmaps alone stay a note."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from island_fast.errors import DamagedImageError
from island_fast.qcow2.image import Image
from tests.images.hostile.samples import Sample
from tests.support import qemu
from tests.support.handmade import extension

pytestmark = qemu.needs_qemu

BACKING_FORMAT, CRYPTO, DATA_FILE, UNKNOWN = 0xE2792ACA, 0x0537BE77, 0x44415441, 5
ROOM = 1024


def extensions(data: bytes, **fields: int) -> Callable[[Sample], None]:
    """Replace all header extensions."""

    def spoil(sample: Sample) -> None:
        begin = 72 if sample.version == 2 else 112
        sample.data[begin:ROOM] = data.ljust(ROOM - begin, b"\0")
        if sample.version == 3:
            sample.set(autoclear=0)
        sample.set(**fields)

    return spoil


def fields(**values: int) -> Callable[[Sample], None]:
    return lambda sample: sample.set(**values)


REFUSED = {
    **{
        f"snapshot table at {at:#x}": fields(snapshots=0, snapshots_offset=at)
        for at in (1, 512, 65535, 66048, (1 << 40) + 512, 1 << 63, (1 << 64) - 65536)
    },
    **{f"header of {length} bytes": fields(length=length) for length in (108, 110, 111, 119, 136)},
    **{f"header of {length} bytes": extensions(b"", length=length) for length in (65529, 65532, 65535)},
    **{
        f"extension cut by the backing name at {at}": extensions(
            extension(UNKNOWN, b"y" * 40), backing_offset=at, backing_length=3
        )
        for at in (116, 120, 128, 152)
    },
    "terminator with a length": extensions(b"\0\0\0\0\xff\xff\xff\xff"),
    "backing format of 16 bytes": extensions(extension(BACKING_FORMAT, b"x" * 16)),
    "backing format of 99 bytes": extensions(extension(BACKING_FORMAT, b"x" * 99)),
    "encryption without encryption": extensions(extension(CRYPTO, bytes(16))),
    "encryption too short, without encryption": extensions(extension(CRYPTO, bytes(8))),
    "empty L1 not aligned": fields(size=0, l1_size=0, l1_offset=512),
    "empty L1 past everything": fields(size=0, l1_size=0, l1_offset=1 << 63),
}  # fmt: skip
READ = {
    "snapshot table at another place, and no snapshots": fields(snapshots=0, snapshots_offset=1 << 40),
    **{f"header of {n} bytes": extensions(b"", length=n) for n in (104, 112, 120, 65528, 65536)},
    "extension up to the backing name": extensions(
        extension(UNKNOWN, b"y" * 40), backing_offset=160, backing_length=3
    ),
    "extensions behind the backing name": extensions(
        extension(UNKNOWN, b"y" * 40), backing_offset=112, backing_length=3
    ),
    "backing format of 15 bytes": extensions(extension(BACKING_FORMAT, b"x" * 15)),
    "data file name without a data file": extensions(extension(DATA_FILE, b"/etc/passwd")),
    "unknown extension": extensions(extension(UNKNOWN, b"y" * 99)),
}  # fmt: skip


def accepts(path: Path) -> bool:
    command = [qemu.QEMU_IMG, "info", "-f", "qcow2", path]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_qemu_refuses_is_refused(name: str, tmp_path: Path) -> None:
    sample = Sample()
    REFUSED[name](sample)
    path = tmp_path / "a.qcow2"
    sample.write(path)
    assert not accepts(path)
    with pytest.raises(DamagedImageError, match=r"damaged qcow2 image: .*; restore it from a good copy"):
        Image.open(path, backed=True)


@pytest.mark.parametrize("name", READ)
def test_what_qemu_reads_is_read(name: str, tmp_path: Path) -> None:
    sample = Sample()
    READ[name](sample)
    path = tmp_path / "a.qcow2"
    sample.write(path)
    assert accepts(path)
    Image.open(path, backed=True).close()


@pytest.mark.parametrize("data", [extension(CRYPTO, bytes(16)), extension(BACKING_FORMAT, b"x" * 20)])
def test_version_2_has_the_same_extensions(data: bytes, tmp_path: Path) -> None:
    sample = Sample(version=2)
    extensions(data)(sample)
    path = tmp_path / "a.qcow2"
    sample.write(path)
    assert not accepts(path)
    with pytest.raises(DamagedImageError):
        Image.open(path)
