#!/bin/sh
# zstandard 0.23.0 (Python): `ZstdDecompressor.decompress` returns the content of the first frame and says
# nothing of bytes after it, unless it is called with allow_extra_data=False; then it raises ZstdError.
# Whoever checks that a stored section is exactly one frame has to ask for that.
# Output seen: "default: 1000 bytes" and "strict: ZstdError".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check zstandard==0.23.0
"$folder/venv/bin/python" - <<'P' | tee "$folder/out"
import zstandard

one = zstandard.ZstdCompressor().compress(bytes(1000))
print("default:", len(zstandard.ZstdDecompressor().decompress(one + b"left over")), "bytes")
try:
    zstandard.ZstdDecompressor().decompress(one + b"left over", allow_extra_data=False)
except zstandard.ZstdError as error:
    print("strict:", type(error).__name__)
P
printf 'default: 1000 bytes\nstrict: ZstdError\n' | cmp - "$folder/out"
