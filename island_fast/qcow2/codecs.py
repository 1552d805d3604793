"""Compressed clusters: hostile streams to exactly one cluster of bytes.

Source: the qcow2 specification, section "Compressed Clusters Descriptor", and what qemu's decoder
takes: a stream counts as good when it fills the cluster. Output never grows past the cluster
whatever the stream claims, and no number from a stream decides an allocation.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import zstandard

__all__ = ["Codec", "CodecError", "Zlib", "Zstd", "codec_for"]

_MAX_WINDOW = 8 << 20
_MAX_FRAMES = 4096
_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE = 0x184D2A5


class CodecError(ValueError):
    """The stream does not give one whole cluster; the message says why. Stays in this package."""


class Codec(Protocol):
    """Decodes streams of one compression type. Not shared between threads."""

    def decode(self, stream: memoryview, target: memoryview) -> None:
        """Fill `target`, one cluster, from the beginning of `stream`; what follows is ignored.

        Raises CodecError: the stream is broken, too short or (zstd) too long.
        """


def codec_for(compression: str) -> Codec:
    """A new decoder for a header's compression type, "zlib" or "zstd"."""
    return Zstd() if compression == "zstd" else Zlib()


class Zlib:
    """Raw deflate. A stream longer than the cluster is cut, as qemu does."""

    def decode(self, stream: memoryview, target: memoryview) -> None:
        """See `Codec.decode`."""
        # qemu writes windows of 4 KiB (wbits -12), and reads what others wrote with 32 KiB.
        try:
            data = zlib.decompressobj(-15).decompress(stream, len(target))
        except zlib.error as error:
            raise CodecError(f"bad deflate stream ({error})") from error
        if len(data) < len(target):
            raise CodecError(f"the stream ends after {len(data)} of {len(target)} bytes")
        target[:] = data


class Zstd:
    """One or more zstd frames, skippable ones allowed; the last must end where the cluster does."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)

    def decode(self, stream: memoryview, target: memoryview) -> None:
        """See `Codec.decode`."""
        filled = at = 0
        for _ in range(_MAX_FRAMES):
            stop, skippable = _frame_end(stream, at)
            if not skippable:
                filled += self._frame(stream[at:stop], target[filled:])
            if filled == len(target):
                return
            at = stop
        raise CodecError(f"more than {_MAX_FRAMES} frames")

    def _frame(self, frame: memoryview, target: memoryview) -> int:
        """Decode one frame to the beginning of `target`; returns the bytes it gave."""
        filled = 0
        try:
            with self._decompressor.stream_reader(frame) as reader:
                while filled < len(target) and (got := reader.readinto(target[filled:])):
                    filled += got
                if filled == len(target) and reader.read(1):
                    raise CodecError("a frame is longer than the cluster")
        except zstandard.ZstdError as error:
            raise CodecError(f"bad zstd stream ({error})") from error
        return filled


def _frame_end(stream: memoryview, at: int) -> tuple[int, bool]:
    """Where the frame at `at` ends, and whether it is skippable.

    Source: RFC 8878, sections 3.1.1 and 3.1.2. Bytes behind the last frame belong to other clusters
    and may look like a frame, so the end has to come from the frame itself.
    """
    magic = _number(stream, at, 4)
    if magic >> 4 == _SKIPPABLE:
        return _inside(stream, at + 8 + _number(stream, at + 4, 4)), True
    if magic != _ZSTD_MAGIC:
        raise CodecError("no zstd frame where one is needed")
    descriptor = _number(stream, at + 4, 1)
    single = descriptor >> 5 & 1
    content_bytes = (single, 2, 4, 8)[descriptor >> 6]
    at += 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + content_bytes
    last = False
    while not last:
        block = _number(stream, at, 3)
        last = bool(block & 1)
        # Type 1 repeats one byte `size` times; all other types store `size` bytes.
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
    return _inside(stream, at + (4 if descriptor & 4 else 0)), False


def _number(stream: memoryview, at: int, length: int) -> int:
    return int.from_bytes(stream[at : _inside(stream, at + length)], "little")


def _inside(stream: memoryview, stop: int) -> int:
    if stop > len(stream):
        raise CodecError("the stream is cut off")
    return stop
