"""Examples of README and quickstart, run: `python scripts/readme.py` checks them, `--write` puts output in.

Each ```console block is a part of one session: lines that start with "$ " are typed, what follows is the
output. The session runs in an empty folder with a local state of its own: nothing of the user's is touched.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs/quickstart.md")
_BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
_MARK = "::end of command::"


def commands(text: str) -> list[str]:
    """Every command of a page, in order."""
    return [
        line[2:] for block in _BLOCK.findall(text) for line in block.splitlines() if line.startswith("$ ")
    ]


def run(typed: list[str]) -> list[str]:
    """The output of each command, standard error included, in one shell session."""
    with tempfile.TemporaryDirectory() as folder:
        bin_folder = str(Path(sys.executable).parent)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("ISLAND", "OS_", "ST_"))}
        environment |= {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "ISLAND_STATE": f"{folder}/.state",
            "COLUMNS": "100",
        }
        script = "".join(f"{command}\necho '{_MARK}'\n" for command in typed)
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1; set -e\n{script}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the page's commands fail:\n{done.stdout}")
        return [part.removeprefix("\n") for part in done.stdout.split(f"{_MARK}\n")[:-1]]


def with_output(text: str, outputs: list[str]) -> str:
    """The page with each command followed by its output."""
    left = iter(outputs)

    def filled(match: re.Match[str]) -> str:
        typed = [line for line in match[0].splitlines() if line.startswith("$ ")]
        return "".join(f"{line}\n{next(left)}" for line in typed)

    return _BLOCK.sub(filled, text)


def alike(one: str, other: str) -> bool:
    """Whether two lines differ in nothing but ids, times and a few bytes of size."""
    told = [re.sub(r"\b[0-9a-f]{8,32}\b", "ID", line) for line in (one, other)]
    told = [re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\dZ?", "DATE", line) for line in told]
    told = [re.sub(r"\b\d+(\.\d+)? (ms|s)\b", "TIME", line) for line in told]
    told = [re.sub(r'("seconds": )[\d.]+', r"\1TIME", line) for line in told]
    told = [re.sub(r"\s+", " ", line).rstrip() for line in told]
    numbers = [[float(n) for n in re.findall(r"\d+(?:\.\d+)?", line)] for line in told]
    shape = [re.sub(r"\d+(?:\.\d+)?", "N", line) for line in told]
    return shape[0] == shape[1] and all(abs(a - b) <= 0.1 * max(a, b) for a, b in zip(*numbers, strict=True))


def differences(text: str, real: str) -> list[str]:
    """Lines of a page that are not what a run gives."""
    pairs = zip_longest(text.splitlines(), real.splitlines(), fillvalue="")
    return [f"- {a}\n+ {b}" for a, b in pairs if not alike(a, b)]


def main() -> None:
    """Check the pages, or write them."""
    found = []
    for page in PAGES:
        text = page.read_text()
        real = with_output(text, run(commands(text)))
        if "--write" in sys.argv:
            page.write_text(real)
        else:
            found += differences(text, real)
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
