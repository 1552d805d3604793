"""Run the examples of README.md and docs/quickstart.md.

    scripts/readme.py            check that the pages show what the commands print
    scripts/readme.py --write    write what they print into the pages

All ```console blocks of a page are one session: lines that start with "$ " are commands, the lines after one
are its output. The session runs in an empty folder with its own local state, so it touches nothing of yours.
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


def find_commands(text: str) -> list[str]:
    """Return the commands of a page, in order."""
    return [
        line[2:] for block in _BLOCK.findall(text) for line in block.splitlines() if line.startswith("$ ")
    ]


def run(typed: list[str]) -> list[str]:
    """Run commands in one shell session; return the output of each, standard error included."""
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
            raise SystemExit(f"the commands of the page fail:\n{done.stdout}")
        return [part.removeprefix("\n") for part in done.stdout.split(f"{_MARK}\n")[:-1]]


def insert_output(text: str, outputs: list[str]) -> str:
    """Return the page with each command followed by its output."""
    left = iter(outputs)

    def fill(match: re.Match[str]) -> str:
        typed = [line for line in match[0].splitlines() if line.startswith("$ ")]
        return "".join(f"{line}\n{next(left)}" for line in typed)

    return _BLOCK.sub(fill, text)


def is_alike(one: str, other: str) -> bool:
    """Return whether two lines differ only in ids, dates, times, samples, and sizes by at most a tenth."""
    lines = [re.sub(r"\b[0-9a-f]{8,32}\b", "ID", line) for line in (one, other)]
    lines = [re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\dZ?", "DATE", line) for line in lines]
    lines = [re.sub(r"\b\d+(\.\d+)? (ms|s)\b", "TIME", line) for line in lines]
    lines = [re.sub(r'("seconds": )[\d.]+', r"\1TIME", line) for line in lines]
    lines = [re.sub(r"[\d.]+ [KM]iB; \d+ unchanged blocks compared", "SAMPLE", line) for line in lines]
    lines = [
        re.sub(r'("blocks_sampled": )\d+, ("bytes_read": )\d+', r"\1SAMPLE, \2SAMPLE", line) for line in lines
    ]
    lines = [re.sub(r"\s+", " ", line).rstrip() for line in lines]
    numbers = [[float(n) for n in re.findall(r"\d+(?:\.\d+)?", line)] for line in lines]
    shape = [re.sub(r"\d+(?:\.\d+)?", "N", line) for line in lines]
    return shape[0] == shape[1] and all(abs(a - b) <= 0.1 * max(a, b) for a, b in zip(*numbers, strict=True))


def find_differences(text: str, real: str) -> list[str]:
    """Return the lines of a page that differ from a run's."""
    pairs = zip_longest(text.splitlines(), real.splitlines(), fillvalue="")
    return [f"- {a}\n+ {b}" for a, b in pairs if not is_alike(a, b)]


def main() -> None:
    """Check the pages, or write them."""
    found = []
    for page in PAGES:
        text = page.read_text()
        real = insert_output(text, run(find_commands(text)))
        if "--write" in sys.argv:
            page.write_text(real)
        else:
            found += find_differences(text, real)
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
