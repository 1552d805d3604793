"""Plant mistakes in a copy of the package, one at a time, and check that random lives find each.

    scripts/mutants.py [WORD...]     plant all mistakes, or those whose names contain one of the words

A mistake is a list of edits: an exact text, which must occur exactly once in a file, and its replacement. For
each mistake the script runs LIVES random lives of tests/faults/machine, with one of SEEDS after another
until a life finds it; for mistakes about copies to another repository, the lives of
tests/operations/test_copying_lives.py. The exit code is 1 if no life finds a mistake.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)  # which moments lives meet is chance: a mistake survives only if all rounds miss it
LIVES = 240
LIVES_OF_COPIES = 40
SEEDS_OF_COPIES = tuple(1 + LIVES_OF_COPIES * number for number in range(3))  # each life has its own seed
LIVES_FILE = "tests/operations/test_copying_lives.py"

Edit = tuple[str, str, str]  # file below island_fast/, text, its replacement

MISTAKES: dict[str, list[Edit]] = {
    "the record comes before the manifest": [
        (
            "repository/snapshot_writer.py",
            "        lineage.store.put(name, [data])\n        row = ",
            "        row = ",
        ),
        (
            "repository/snapshot_writer.py",
            "        self.objects += 2\n",
            "        lineage.store.put(name, [data])\n",
        ),
    ],
    "the record comes before the packs": [
        (
            "repository/pack_writer.py",
            "            self._store.put(name, parts)\n",
            "            unsent = self._store.__dict__.setdefault('unsent', [])\n"
            "            unsent.append((name, [bytes(part) for part in parts]))\n",
        ),
        (
            "repository/snapshot_writer.py",
            "        self.objects += 2\n",
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
            "repository/liveness.py",
            "neighbours = state.children(row.id) + (",
            "neighbours = state.children(row.id)[1:] + (",
        ),
    ],
    "the parent of a deleted snapshot is not looked at": [
        ("repository/liveness.py", "+ ([parent] if parent else [])", ""),
    ],
    "siblings of a deleted snapshot are not looked at": [
        ("repository/liveness.py", "            if sibling.id != row.id:\n", "            if False:\n"),
    ],
    "children of a deleted snapshot do not get its parent": [
        ("formats/catalog.py", "replace(child, parent=row.parent)", "child"),
    ],
    "412 is success, and nothing is read back": [
        ("stores/swift.py", "if not self._holds(connection, name, content):\n", "if False:\n"),
        ("repository/lineage.py", "same = get_checked(self.store, name, check, newest=True)", "same = True"),
    ],
    "a record is not read back": [
        ("repository/lineage.py", "same = get_checked(self.store, name, check, newest=True)", "same = True"),
    ],
    "one look at a missing object is enough": [
        ("stores/swift.py", "_LOOKS = 3", "_LOOKS = 1"),
    ],
    "objects are deleted before the sweep's record": [
        (
            "operations/sweep.py",
            "        try:\n            self._record(epoch, renamed)\n",
            "        for name, _ in self._list_doomed():\n            self._lineage.store.delete(name)\n"
            "        try:\n            self._record(epoch, renamed)\n",
        ),
    ],
    "a sweep goes on in a later epoch": [
        ("operations/sweep.py", "if lineage.epoch != epoch:", "if False:"),
    ],
    "slots that die during a repack come back to life": [
        (
            "repository/liveness.py",
            "dead=lineage.state.packs.dead[at] - before.dead)",
            "dead=before.dead - before.dead)",
        ),
    ],
    "a sweep takes objects of running snapshots for garbage": [
        ("operations/sweep.py", "if snapshot in running or info.age < age:", "if info.age < age:"),
    ],
    "the base of a running snapshot may be deleted": [
        ("operations/delete.py", "if alive and registration.parent == snapshot:", "if False:"),
        (
            "repository/snapshot_writer.py",
            "if parent is not None and parent not in lineage.state.live:",
            "if False:",
        ),
    ],
    "a snapshot commits without its registration": [
        (
            "repository/snapshot_writer.py",
            "if self._registration not in lineage.files.registrations:",
            "if False:",
        ),
    ],
    "a snapshot commits into a later epoch": [
        ("repository/snapshot_writer.py", "if lineage.epoch != self._registration.epoch:", "if False:"),
    ],
    "a writer does not look for the end of its epoch": [
        (
            "repository/lineage.py",
            "        if self._has_ended(record.epoch, self.store.peek):\n",
            "        if False:\n",
        ),
    ],
    "an adopter does not read the epoch to its end": [
        (
            "repository/lineage.py",
            "            self._read_as_far_as_listed()\n            at = self._at\n",
            "            at = self._at\n",
        ),
    ],
    "local state that was put back goes on with what was in progress": [
        ("repository/lineage.py", "            self.files.forget_progress()\n", ""),
    ],
    "a copy of local state has its original's writer id": [
        (
            "repository/identity.py",
            "return all(one == two for one, two in pairs if one and two)",
            "return bool(pairs)",
        ),
    ],
    "whoever wants to may write": [
        ("repository/lineage.py", "        if not self.owned_here:\n", "        if False:\n"),
    ],
    "a record of unknown outcome is forgotten": [
        ("repository/lineage.py", '            self.files.pending.add(name.rpartition("/")[2], data)\n', ""),
    ],
    "a record that was refused stays pending": [
        ("repository/lineage.py", "if not unknown and not sent_before:", "if False:"),
    ],
    "a record that was refused only when it was sent again is forgotten": [
        (
            "repository/lineage.py",
            "        self._send(name, data, sent_before=True)\n",
            "        self._send(name, data, sent_before=False)\n",
        ),
    ],
    "a record is forgotten although an earlier try of it can have succeeded": [
        ("stores/swift_connection.py", "            if writes and doubtful:\n", "            if False:\n"),
    ],
    "the end of the catalog is taken from a listing": [
        (
            "repository/lineage.py",
            "if look is not None and look(name) is None:",
            "if look is not None and name not in [i.name for i in self.store.list(f'{self.name}/catalog/')]:",
        ),
    ],
    "a repack drops a slot too many": [
        ("formats/catalog.py", "keep[first:stop] = False", "keep[first : stop + 1] = False"),
    ],
    "a repack moves slots": [
        (
            "formats/catalog.py",
            "            keep[first:stop] = False\n",
            "            keep[: stop - first] = False\n",
        ),
    ],
    "a repacked pack keeps its count of dead bytes": [
        (
            "repository/liveness.py",
            "dead=lineage.state.packs.dead[at] - before.dead)",
            "dead=lineage.state.packs.dead[at])",
        ),
    ],
    "a wholly dead pack is not seen": [
        ("formats/catalog.py", "gone = dead_slots >= packs.slots", "gone = dead_slots > packs.slots"),
    ],
    "what crashed snapshots registered is never given up": [
        ("repository/local_state.py", "[snapshot for snapshot in gone if self._age(snapshot) >= age]", "[]"),
    ],
    "a sweep does not heed the grace": [
        ("operations/sweep.py", "if snapshot in running or info.age < age:", "if snapshot in running:"),
        ("operations/sweep.py", "and info.age >= age\n", "\n"),
    ],
    "an id that is used up is gone on with": [
        ("repository/snapshot_writer.py", "    remove_used_registrations(lineage)\n", ""),
        (
            "formats/catalog.py",
            "if used or bool((self.packs.find(event.packs.key) >= 0).any()):",
            "if False:",
        ),
    ],
    "what an interrupted attempt sent is not compared": [
        (
            "repository/streams.py",
            "    kept = known.kept.matches(blocks, digests) & ~same\n    fresh",
            "    sent = [b for a in known.kept._runs.intervals().tolist() for b in range(*a)]\n"
            "    kept = np.isin(blocks, sent) & ~same\n    fresh",
        ),
    ],
    "an attempt numbers its packs like the one before it": [
        ("repository/snapshot_writer.py", "max(self._sent, default=-1) + 1", "0"),
    ],
    "slots that a later attempt has no use for are not dead": [
        (
            "repository/snapshot_writer.py",
            "return kept.update(written), dead\n",
            "return kept.update(written), dead[:0]\n",
        ),
    ],
    "garbage is never removed": [
        (
            "operations/sweep.py",
            "elif len(garbage) < _MOST and _is_confirmed(lineage, info, age):",
            "elif False:",
        ),
    ],
    "a stop is the only sign of the end of an epoch": [
        (
            "repository/lineage.py",
            "signs = (stop_name(self.name, epoch), catalog_name(self.name, epoch + 1, 0))",
            "signs = (stop_name(self.name, epoch),)",
        ),
        (
            "repository/lineage.py",
            "and not self._step(epoch + 1, 0, look):",
            "and not (look(stop_name(self.name, epoch)) and self._step(epoch + 1, 0, look)):",
        ),
    ],
    "what others stored is garbage": [
        ("operations/sweep.py", "if snapshot not in accounted and not unknown:", "if False:"),
    ],
    "a listing alone makes garbage": [
        ("operations/sweep.py", "elif len(garbage) < _MOST and _is_confirmed(lineage, info, age):", "else:"),
    ],
    "a listing of another prefix is believed": [
        (
            "stores/swift.py",
            "if isinstance(path, str) and not path.startswith(self._prefix + prefix):",
            "if False:",
        ),
    ],
    "a repository older than local state is appended to": [
        ("repository/lineage.py", "        if at.stored:\n            return\n", "        return\n"),
    ],
    "a snapshot inherits from one whose manifest is gone": [
        ("operations/snapshot.py", "lineage.require_manifest(self._choice.parent)", "pass"),
    ],
    "a 404 to HEAD is believed at once, and an adopter does not list": [
        ("stores/swift.py", "return self._head(name, _LOOKS)", "return self._head(name, 1)"),
        (
            "repository/lineage.py",
            "while listed is not None and self._at.place < listed:",
            "while False:",
        ),
    ],
    "claims are listed before one's own is there": [
        (
            "repository/claims.py",
            "            self._make()\n            try:\n                rivals = self._find_rivals()\n",
            "            try:\n                rivals = self._find_rivals()\n                self._make()\n",
        ),
        ("repository/claims.py", "        if not seen:\n", "        if False:\n"),
    ],
    "the claims of others do not matter": [
        ("repository/claims.py", "if writer == self._writer or (", "if True or ("),
    ],
    "claims on a later epoch are the rivals": [
        ("repository/claims.py", "elif stem == self._stem:", "elif stem > self._stem:"),
    ],
    "a young claim counts no more": [
        ("repository/claims.py", "EXPIRES = 5400.0", "EXPIRES = 1800.0"),
        ("repository/claims.py", "_USED = EXPIRES - _LATE - PUTS_END", "_USED = 600.0"),
    ],
    "a winner withdraws although its record may be under way": [
        ("repository/lineage.py", "            if not self._is_pending(epoch):\n", "            if True:\n"),
    ],
    "a first record is sent again without a claim": [
        (
            "repository/lineage.py",
            "        if not record.number and not self.store.refuses_overwrites() and",
            "        if False and not self.store.refuses_overwrites() and",
        ),
    ],
    "nobody looks whether the epoch has begun": [
        ("repository/claims.py", "taken = not rivals and is_taken()", "taken = False"),
        ("repository/lineage.py", "            if at.epoch != epoch:\n", "            if False:\n"),
        ("stores/swift.py", "looks=not self.known_to_refuse)", "looks=False)"),
    ],
    "what a deleted snapshot wrote is not compared": [
        (
            "operations/parent.py",
            "Base(internal, inherited.differing(present))",
            "Base(internal, NO_INTERVALS)",
        ),
    ],
}


MISTAKES_OF_COPIES: dict[str, list[Edit]] = {
    "a copy made again inherits what its first one left": [
        ("operations/copy.py", "[held.pack >> PACK_BITS == far.numbers.number(row.id)]", "[:0]"),
    ],
    "a copy made again numbers its packs from 0": [
        (
            "repository/snapshot_writer.py",
            "max(self._kept.next_number, int(mine.max(initial=-1)) + 1)",
            "self._kept.next_number",
        )
    ],
    "a copy made again has the names of its first one": [
        ("operations/copy.py", "int.from_bytes(os.urandom(6))", "0"),
    ],
    "a copy made again is refused": [
        ("operations/copy.py", "if later is None and row.id not in state.dropped:", "if later is None:"),
    ],
    "what differs between two copies is not looked at": [
        ("operations/copy.py", "[runs.differing(near_held), ", "["),
    ],
    "what a far parent has is believed without its digests": [
        (
            "repository/streams.py",
            "    same = known.parent.matches(blocks, digests)\n    return",
            "    same = ~none\n    return",
        ),
    ],
    "a snapshot goes on with an interrupted copy": [
        ("repository/local_state.py", "if r.copied == (copied is not None) and copied", "if copied"),
    ],
    "the snapshot that was copied last is the newest": [
        ("operations/copy.py", "        later = self._find_next(row)\n", "        later = None\n"),
    ],
    "copies stand by their times alone": [
        ("operations/copy.py", "        for one, place in zip(rows[first:], places[first:], strict=True):\n",
         "        for one, place in zip(rows, [None] * len(rows), strict=True):\n"),
    ],
    "what differs between the parent and the snapshot that both have is not looked at": [
        ("operations/copy.py", "held.differing(far_held), barred]", "barred]"),
    ],
    "a copy of all brings back what was deleted there": [
        ("operations/copy.py", "            if wanted is None:\n", "            if False:\n"),
    ],
    "a checkpoint forgets what sweeps removed": [
        ("formats/catalog.py", "        if record.state.swept:\n", "        if False:\n"),
    ],
}  # fmt: skip


def main() -> int:
    """Plant each mistake that the command line asks for."""
    words = sys.argv[1:]
    every = MISTAKES | MISTAKES_OF_COPIES
    chosen = [name for name in every if not words or any(word in name for word in words)]
    survivors = [name for name in chosen if not try_mistake(name, every[name])]
    print(f"{len(chosen)} mistakes, {len(chosen) - len(survivors)} found")
    return 1 if survivors else 0


def try_mistake(name: str, edits: list[Edit]) -> bool:
    """Plant a mistake, run the lives, print the outcome, and return whether they found it."""
    with tempfile.TemporaryDirectory(prefix="island-mutant-") as folder:
        copy = Path(folder)
        for part in ("island_fast", "tests/faults/machine"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("scripts/random_lives.py", "tests/support/memory_store.py", LIVES_FILE):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        for file, text, instead in edits:
            plant(name, copy / "island_fast" / file, text, instead)
        began = time.monotonic()
        by = (run_copying_lives if name in MISTAKES_OF_COPIES else run_machine_lives)(name, copy)
    taken = f"{time.monotonic() - began:5.0f} s"
    print(f"{'found' if by else 'SURVIVED':8} {taken}  {name}{': ' if by else ''}{by}", flush=True)
    return bool(by)


def run_machine_lives(name: str, copy: Path) -> str:
    """Run the state machine on the package in `copy`, a round for each seed; return what it finds, or ""."""
    for seed in SEEDS:
        done = subprocess.run(
            [sys.executable, "scripts/random_lives.py", "--seed", str(seed), "--lives", str(LIVES)],
            cwd=copy, capture_output=True, text=True, check=False,
        )  # fmt: skip
        by = [line for line in done.stdout.splitlines() if line.startswith("FOUND: ")]
        if bool(by) != (done.returncode == 1):
            raise SystemExit(f"{name}: the machine did not run:\n{done.stdout}{done.stderr}")
        if by:
            return "".join(by)[7:]
    return ""


def run_copying_lives(name: str, copy: Path) -> str:
    """Run the lives of copies on the package in `copy`, a round for each seed; return what they find."""
    for seed in SEEDS_OF_COPIES:
        environ = os.environ | {"COPIES_SEED": str(seed), "COPIES_LIVES": str(LIVES_OF_COPIES)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", LIVES_FILE],
            cwd=copy, capture_output=True, text=True, check=False, env=environ,
        )  # fmt: skip
        by = [line[4:] for line in done.stdout.splitlines() if line.startswith("E   ")]
        if bool(by) != (done.returncode == 1):
            raise SystemExit(f"{name}: the lives did not run:\n{done.stdout}{done.stderr}")
        if by:
            return by[0].strip()
    return ""


def plant(name: str, path: Path, text: str, instead: str) -> None:
    """Replace `text`, which must occur exactly once in the file, by `instead`."""
    source = path.read_text()
    if source.count(text) != 1:
        raise SystemExit(f"{name}: {path.name} has this text {source.count(text)} times, not once:\n{text}")
    path.write_text(source.replace(text, instead))


if __name__ == "__main__":
    sys.exit(main())
