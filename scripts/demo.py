"""Show what island does, in a minute: take three snapshots of a real volume, restore one, and compare.

Everything is done with the command `island`, as a user would type it, and with qemu's tools. The table at the
end shows what they printed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 1 << 20
BLOCK = 65536
STEPS: list[tuple[str, ...]] = []
console = Console(highlight=False)


def run(*argv: str | Path) -> str:
    """Run a program, and return its standard output. Ends this process if the program fails."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    done = subprocess.run(
        [str(a) for a in argv], capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(str(a) for a in argv)}\nfailed: {done.stderr or done.stdout}")
    return done.stdout


def island(*argv: str | Path) -> Any:  # noqa: ANN401 (JSON)
    """Run `island ... --json`, and return its answer."""
    console.print(f"[bold]$ island {' '.join(Path(a).name for a in argv)}[/]", soft_wrap=True)
    return json.loads(run(sys.executable, "-m", "island_fast", *argv, "--json"))


def write_files(folder: Path, count: int, seed: int) -> None:
    """Write files of 1 MiB, each half random bytes and half text."""
    draw = random.Random(seed)
    folder.mkdir()
    for number in range(count):
        text = f"line {number} of file {seed}\n".encode() * (MIB // 48)
        (folder / f"file{seed}-{number}").write_bytes(draw.randbytes(MIB - len(text)) + text)


def change(disk: Path, volume: Path, work: Path) -> None:
    """Change the volume as a guest would: write files with debugfs, then write what changed to the volume."""
    before = work / "before.raw"
    run("cp", "--sparse=always", disk, before)
    folder = work / f"new{len(STEPS)}"
    write_files(folder, 3, seed=len(STEPS))
    for number, file in enumerate(sorted(folder.iterdir())):
        run("debugfs", "-w", "-R", f"rm report{number}", disk)
        run("debugfs", "-w", "-R", f"write {file} report{number}", disk)
    writes = []
    with open(before, "rb") as old, open(disk, "rb") as new:
        for at in range(0, disk.stat().st_size, BLOCK):
            if old.read(BLOCK) != (content := new.read(BLOCK)):
                piece = work / f"piece{len(writes)}"
                piece.write_bytes(content)
                writes += ["-c", f"write -q -s {piece} {at} {len(content)}"]
    run("qemu-io", "-f", "qcow2", *writes, volume)


def format_size(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / MIB:.1f} MiB" if count >= MIB // 10 else f"{count / 1024:.1f} KiB"


def take_snapshot(volume: Path, label: str) -> str:
    """Take a snapshot, add what it cost to the table, and return its name."""
    answer = island("snapshot", volume, "--label", label)
    STEPS.append(
        (
            f"snapshot '{label}'",
            answer["rule"],
            f"{answer['blocks_candidate']:,}",
            format_size(answer["bytes_read"]),
            format_size(answer["bytes_stored"]),
            f"{answer['seconds']:.2f} s",
        )
    )
    return f"{answer['volume']}@{answer['snapshot']}"


def demo(work: Path) -> None:
    """Run the steps in `work`, which the caller removes afterwards."""
    os.environ |= {"ISLAND_REPOSITORY": str(work / "repository"), "ISLAND_STATE": str(work / "state")}
    disk, volume = work / "disk.raw", work / "web1.qcow2"
    write_files(work / "files", 100, seed=0)
    run("mke2fs", "-q", "-t", "ext4", "-d", work / "files", disk, "512M")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=on", disk, volume)
    console.print(
        f"a volume of 512 MiB with 100 files on ext4, as a qcow2 of {format_size(volume.stat().st_size)}"
    )

    take_snapshot(volume, "first")
    change(disk, volume, work)
    middle = take_snapshot(volume, "second")
    change(disk, volume, work)
    last = take_snapshot(volume, "third")

    deleted = island("delete", middle)[0]
    swept = island("sweep")[0]
    STEPS.append(("delete 'second'", f"freed {format_size(swept['bytes_freed'])}", "", "", "", ""))
    target = work / "restored.qcow2"
    restored = island("restore", last, target)
    blocks = f"{restored['bytes_written'] // BLOCK:,}"
    STEPS.append(
        (
            "restore 'third'",
            "checked",
            blocks,
            format_size(restored["bytes_read"]),
            "",
            f"{restored['seconds']:.2f} s",
        )
    )
    console.print("[bold]$ qemu-img compare web1.qcow2 restored.qcow2[/]")
    console.print(run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", volume, target).strip())
    console.print(run("qemu-img", "check", "-f", "qcow2", target).splitlines()[0])
    assert deleted["bytes_unreferenced"] >= 0


def main() -> None:
    """Run the demo and show its table."""
    work = Path(tempfile.mkdtemp(prefix="island-demo-"))
    try:
        demo(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    table = Table("step", "how", "blocks", "read", "sent", "time")
    for column in table.columns[2:]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for step in STEPS:
        table.add_row(*step)
    console.print(table)


if __name__ == "__main__":
    main()
