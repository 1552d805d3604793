"""Decoders for compressed clusters: from a hostile stream to exactly one cluster of bytes.

Source: the qcow2 specification, section "Compressed Clusters Descriptor", and what QEMU's decoder accepts: a
stream is good if it fills the cluster. Output never grows past the cluster whatever the stream claims, and no
number from a stream decides an allocation.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import zstandard

__all__ = ["Codec", "CodecError", "Zlib", "Zstd", "make_codec"]

_MAX_WINDOW = 8 << 20
_MAX_FRAMES = 4096
_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE = 0x184D2A5


class CodecError(ValueError):
    """The stream does not decode to one whole cluster; the message says why. Does not leave this package."""


class Codec(Protocol):
    """A decoder for one compression type. Not thread-safe."""

    def decode(self, stream: memoryview, target: memoryview) -> None:
        """Fill `target`, one cluster, from the beginning of `stream`; ignore what follows.

        Raises CodecError: the stream is broken, too short or (zstd) too long.
        """


def make_codec(compression: str) -> Codec:
    """Return a new decoder for a header's compression type, "zlib" or "zstd"."""
    return Zstd() if compression == "zstd" else Zlib()


class Zlib:
    """Raw deflate. A stream longer than the cluster is cut off, as QEMU does."""

    def decode(self, stream: memoryview, target: memoryview) -> None:
        """See `Codec.decode`."""
        # QEMU writes with a window of 4 KiB (wbits -12) and reads what others wrote with 32 KiB.
        try:
            data = zlib.decompressobj(-15).decompress(stream, len(target))
        except zlib.error as error:
            raise CodecError(f"bad deflate stream ({error})") from error
        if len(data) < len(target):
            raise CodecError(f"the stream ends after {len(data)} of {len(target)} bytes")
        target[:] = data


class Zstd:
    """One or more zstd frames, skippable ones allowed; the last must end where the cluster ends."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)

    def decode(self, stream: memoryview, target: memoryview) -> None:
        """See `Codec.decode`."""
        filled = at = 0
        for _ in range(_MAX_FRAMES):
            stop, skippable = _find_frame_end(stream, at)
            if not skippable:
                filled += self._decode_frame(stream[at:stop], target[filled:])
            if filled == len(target):
                return
            at = stop
        raise CodecError(f"more than {_MAX_FRAMES} frames")

    def _decode_frame(self, frame: memoryview, target: memoryview) -> int:
        """Decode one frame to the beginning of `target`; return how many bytes it holds."""
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


def _find_frame_end(stream: memoryview, at: int) -> tuple[int, bool]:
    """Return where the frame at `at` ends, and whether it is skippable.

    Source: RFC 8878, sections 3.1.1 and 3.1.2. Bytes after the last frame belong to other clusters and can
    look like a frame, so the end must come from the frame itself.
    """
    magic = _read_number(stream, at, 4)
    if magic >> 4 == _SKIPPABLE:
        return _check_end(stream, at + 8 + _read_number(stream, at + 4, 4)), True
    if magic != _ZSTD_MAGIC:
        raise CodecError("there is no zstd frame where one must begin")
    descriptor = _read_number(stream, at + 4, 1)
    single = descriptor >> 5 & 1
    content_bytes = (single, 2, 4, 8)[descriptor >> 6]
    at += 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + content_bytes
    last = False
    while not last:
        block = _read_number(stream, at, 3)
        last = bool(block & 1)
        # Type 1 repeats one byte `size` times; all other types store `size` bytes.
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
    return _check_end(stream, at + (4 if descriptor & 4 else 0)), False


def _read_number(stream: memoryview, at: int, length: int) -> int:
    """Return the little-endian number of `length` bytes at `at`."""
    return int.from_bytes(stream[at : _check_end(stream, at + length)], "little")


def _check_end(stream: memoryview, stop: int) -> int:
    """Return `stop`, or raise CodecError if it is past the end of the stream."""
    if stop > len(stream):
        raise CodecError("the stream is cut off")
    return stop
