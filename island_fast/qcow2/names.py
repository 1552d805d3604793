r"""Names from an image, which are bytes, as text that is safe to print, store and compare.

Printable UTF-8 stays as it is, a backslash is doubled, and every other byte becomes `\xNN`. The mapping is
one to one: different names have different texts, and `unescape` returns the exact bytes.
"""

from __future__ import annotations

import re

__all__ = ["escape", "unescape"]

_ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2})")


def escape(raw: bytes) -> str:
    """Return the printable text that stands for exactly these bytes."""
    text = raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escape_character(c) for c in text)


def unescape(text: str) -> bytes:
    """Return the bytes that `escape` made this text from.

    Raises ValueError: a backslash in the text does not begin an escape.
    """
    if "\\" in _ESCAPE.sub("", text):
        raise ValueError(f"not an escaped name: {text!r}")
    pieces = _ESCAPE.split(text)
    # split() alternates plain text and escapes: "a\\xffb" gives ["a", "xff", "b"].
    plain = [piece.encode() for piece in pieces[::2]]
    escapes = [b"\\" if e == "\\" else bytes.fromhex(e[1:]) for e in pieces[1::2]] + [b""]
    return b"".join(p + e for p, e in zip(plain, escapes, strict=True))


def _escape_character(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())
