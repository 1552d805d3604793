"""Plant mistakes in a copy of the package, one at a time, and see that the state machine finds each.

    scripts/mutants.py [NAME...]     all of them, or those whose names contain one of the words

A mistake is some exact texts, each of which must be there exactly once, and what takes their place. The copy
lives LIVES lives of tests/machine. The exit code is 1 if a mistake survives them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEED = 1
LIVES = 240

Edit = tuple[str, str, str]  # file below island_fast/, text, what takes its place

MISTAKES: dict[str, list[Edit]] = {
    "the record comes before the manifest": [
        ("taking.py", "        lineage.store.put(name, [data])\n        row = ", "        row = "),
        ("taking.py", "        self._objects += 2\n", "        lineage.store.put(name, [data])\n"),
    ],
    "the record comes before the packs": [
        (
            "pipeline.py",
            "            self._store.put(name, parts)\n",
            "            unsent = self._store.__dict__.setdefault('unsent', [])\n"
            "            unsent.append((name, [bytes(part) for part in parts]))\n",
        ),
        (
            "taking.py",
            "        self._objects += 2\n",
            "        for unsent in lineage.store.__dict__.pop('unsent', []):\n"
            "            lineage.store.put(*unsent)\n",
        ),
    ],
    "a PUT that was refused counts as stored": [
        (
            "stores/swift.py",
            "http_status != 412:\n                    raise\n",
            "http_status != 412:\n                    return\n",
        ),
    ],
    "one child of a deleted snapshot is not looked at": [
        (
            "reclaim.py",
            "neighbours = state.children(row.id) + (",
            "neighbours = state.children(row.id)[1:] + (",
        ),
    ],
    "the parent of a deleted snapshot is not looked at": [
        ("reclaim.py", "+ ([parent] if parent else [])", ""),
    ],
    "siblings of a deleted snapshot are not looked at": [
        ("reclaim.py", "            if sibling.id != row.id:\n", "            if False:\n"),
    ],
    "children of a deleted snapshot do not get its parent": [
        ("catalog.py", "replace(child, parent=gone.parent)", "child"),
    ],
    "412 is success, and nothing is read back": [
        ("stores/swift.py", "if not self._holds(connection, name, content):\n", "if False:\n"),
        ("lineage.py", "same = get_checked(self.store, name, check, newest=True)", "same = True"),
    ],
    "a record is not read back": [
        ("lineage.py", "same = get_checked(self.store, name, check, newest=True)", "same = True"),
    ],
    "one look at a missing object is enough": [
        ("stores/swift.py", "_LOOKS = 3", "_LOOKS = 1"),
    ],
    "objects are deleted before the sweep's record": [
        (
            "sweeping.py",
            "        with self._lineage.locked():\n            if self._lineage.epoch",
            "        for name, _ in doomed:\n            self._lineage.store.delete(name)\n"
            "        with self._lineage.locked():\n            if self._lineage.epoch",
        ),
    ],
    "a sweep goes on in a later epoch": [
        ("sweeping.py", "if self._lineage.epoch != epoch:", "if False:"),
    ],
    "slots that die during a repack come back to life": [
        ("sweeping.py", "dead=now.dead - plan.repacked.dead)", "dead=np.zeros_like(now.dead))"),
    ],
    "a sweep takes objects of running snapshots for garbage": [
        ("reclaim.py", "and snapshot not in running ", ""),
    ],
    "the base of a running snapshot may be deleted": [
        ("deleting.py", "if alive and registration.parent == snapshot:", "if False:"),
        ("taking.py", "if parent is not None and parent not in lineage.state.live:", "if False:"),
    ],
    "a snapshot commits without its registration": [
        ("taking.py", "if not lineage.files.registered(self._registration):", "if False:"),
    ],
    "a snapshot commits into a later epoch": [
        ("taking.py", "if lineage.epoch != self._registration.epoch:", "if False:"),
    ],
    "a writer does not look for the end of its epoch": [
        (
            "lineage.py",
            "        if self.store.head(stop_name(self.name, record.epoch)):\n",
            "        if False:\n",
        ),
    ],
    "an adopter does not read the epoch to its end": [
        ("lineage.py", "        self._follow()\n        at = self._at\n", "        at = self._at\n"),
    ],
    "whoever wants to may write": [
        ("lineage.py", "        if self.owner != writer:\n", "        if False:\n"),
    ],
    "a record of unknown outcome is forgotten": [
        ("lineage.py", '        self.files.set_pending(name.rpartition("/")[2], data)\n', ""),
    ],
    "the end of the catalog is taken from a listing": [
        (
            "lineage.py",
            "if not known and self.store.head(name) is None:",
            "if not known and name not in [i.name for i in self.store.list(f'{self.name}/catalog/')]:",
        ),
    ],
    "a repack drops a slot too many": [
        ("reclaim.py", "keep[first:stop] = False", "keep[first : stop + 1] = False"),
    ],
    "a repack moves slots": [
        ("reclaim.py", "        keep[first:stop] = False\n", "        keep[: stop - first] = False\n"),
    ],
    "a repacked pack keeps its count of dead bytes": [
        ("sweeping.py", "dead=now.dead - plan.repacked.dead)", "dead=now.dead)"),
    ],
    "a wholly dead pack is not seen": [
        ("reclaim.py", "gone = dead_slots >= packs.slots", "gone = dead_slots > packs.slots"),
    ],
    "what crashed snapshots registered is never given up": [
        ("local.py", "[snapshot for snapshot in gone if self._age(snapshot) >= age]", "[]"),
    ],
    "a sweep does not heed the grace": [
        ("reclaim.py", "info.age >= age:", "True:"),
    ],
    "an id that is used up is gone on with": [
        ("resuming.py", "    forget_used(lineage)\n", ""),
        ("catalog.py", "            self._refuse_used(record, record.snapshot.id)\n", ""),
    ],
    "what an interrupted attempt sent is not compared": [
        (
            "pipeline.py",
            "known.kept.same(blocks, digests) & ~equal",
            "np.isin(blocks, [b for a in known.kept._runs.intervals().tolist() for b in range(*a)]) & ~equal",
        ),
    ],
    "an attempt numbers its packs like the one before it": [
        ("resuming.py", "max(self._sent, default=-1) + 1", "0"),
    ],
    "slots that a later attempt has no use for are not dead": [
        ("taking.py", "return kept.updated(written), dead\n", "return kept.updated(written), dead[:0]\n"),
    ],
    "garbage is never removed": [
        ("reclaim.py", "info.age >= age:", "False:"),
    ],
    "what a deleted snapshot wrote is not compared": [
        (
            "choosing.py",
            "differing(keyed(lineage, retired), keyed(lineage, lineage.manifest(ancestor)))",
            "_NONE",
        ),
    ],
}


def main() -> int:
    """Plant each mistake that the command line asks for."""
    words = sys.argv[1:]
    chosen = [name for name in MISTAKES if not words or any(word in name for word in words)]
    survivors = [name for name in chosen if not found(name, MISTAKES[name])]
    print(f"{len(chosen)} mistakes, {len(chosen) - len(survivors)} found")
    return 1 if survivors else 0


def found(name: str, edits: list[Edit]) -> bool:
    """Whether the machine finds the mistake; says so, with how long it took and by what."""
    with tempfile.TemporaryDirectory(prefix="island-mutant-") as folder:
        copy = Path(folder)
        for part in ("island_fast", "tests/machine"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "machine.py", copy / "scripts")
        for file, text, instead in edits:
            plant(name, copy / "island_fast" / file, text, instead)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "scripts/machine.py", "--seed", str(SEED), "--lives", str(LIVES)],
            cwd=copy, capture_output=True, text=True, check=False,
        )  # fmt: skip
    by = [line for line in done.stdout.splitlines() if line.startswith("FOUND: ")]
    if bool(by) != (done.returncode == 1):
        raise SystemExit(f"{name}: the machine did not run:\n{done.stdout}{done.stderr}")
    taken = f"{time.monotonic() - began:5.0f} s"
    print(
        f"{'found' if by else 'SURVIVED':8} {taken}  {name}{': ' if by else ''}{''.join(by)[7:]}", flush=True
    )
    return bool(by)


def plant(name: str, path: Path, text: str, instead: str) -> None:
    """Put `instead` in the place of `text`, which must be in the file exactly once."""
    source = path.read_text()
    if source.count(text) != 1:
        raise SystemExit(f"{name}: {path.name} has {source.count(text)} times, not once:\n{text}")
    path.write_text(source.replace(text, instead))


if __name__ == "__main__":
    sys.exit(main())
