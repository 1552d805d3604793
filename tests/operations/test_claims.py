"""Where the store refuses no PUT: two hosts that make or adopt one thing, and whatever comes late.

The store is one in memory that overwrites. `before_put` is the moment between its look and the PUT: what
happens there happens while a PUT is held up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from island_fast.api import Repository
from island_fast.errors import ConflictError, RefusedError, StoreError, UnsupportedObjectError
from island_fast.formats import catalog
from island_fast.formats.catalog import CLAIMED
from island_fast.formats.names import claim_name, epoch_stem, parse_claim
from island_fast.repository import claims
from island_fast.repository.local_state import LocalState
from island_fast.stores.base import PUTS_END
from tests.support.memory_store import MemoryStore

MIB = 1 << 20
HOUR = 3600.0
Open = Callable[..., Repository]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store that refuses nothing; its clock goes on while a claimant waits."""
    made = MemoryStore(refuses=False)

    def sleep(seconds: float) -> None:
        made.now += seconds

    clock = SimpleNamespace(sleep=sleep)
    monkeypatch.setattr(claims, "time", clock)
    return made


@pytest.fixture
def host(store: MemoryStore, tmp_path: Path) -> Open:
    """`host(name)`: the repository as the host of that name opens it."""

    def open_at(name: str) -> Repository:
        store.known_to_refuse = None  # every process finds out, or knows by its local state
        return Repository(store, LocalState(tmp_path / name), create=True)

    return open_at


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "vol.raw", b"a")


def write_image(path: Path, content: bytes) -> Path:
    path.write_bytes(content * MIB)
    return path


def take(repository: Repository, path: Path, volume: str = "vol") -> str:
    return repository.snapshot(path, volume=volume, image_format="raw").snapshot


def claims_in(store: MemoryStore) -> list[str]:
    return sorted(name for name in store.objects if parse_claim(name))


def in_the_middle(store: MemoryStore, of: str, act: Callable[[], object]) -> list[object]:
    """Have `act` done once while the first PUT whose name contains `of` is under way; what came of it."""
    outcomes: list[object] = []

    def meddle(name: str, data: bytes) -> None:
        if of in name and not outcomes:
            outcomes.append(None)
            try:
                outcomes[0] = act()
            except (RefusedError, StoreError) as error:
                outcomes[0] = error

    store.before_put = meddle
    return outcomes


def holds(repository: Repository, snapshot: str, content: bytes, folder: Path) -> None:
    target = folder / f"back-{os.urandom(4).hex()}"
    repository.restore(snapshot, target, image_format="raw")
    assert target.read_bytes() == content * MIB


MOMENTS = (
    "repository-claim",
    "repository",
    "000000-claim",
    "catalog/000000-00000000",
    "packs/",
    "manifests/",
    "catalog/000000-00000001",
)


@pytest.mark.parametrize("moment", MOMENTS)
def test_two_hosts_make_one_volume_at_the_same_moment(
    store: MemoryStore, host: Open, tmp_path: Path, moment: str
) -> None:
    """Whoever is answered with success keeps the snapshot; the other is refused and changes nothing of it."""
    paths = {name: write_image(tmp_path / f"{name}.raw", name.encode()) for name in "ab"}
    other = host("b")
    outcomes = in_the_middle(store, moment, lambda: take(other, paths["b"]))
    taken: dict[str, str] = {}
    with contextlib.suppress(RefusedError):
        taken["a"] = take(host("a"), paths["a"])
    assert outcomes, "the moment did not come"
    if isinstance(outcomes[0], str):
        taken["b"] = outcomes[0]
    assert len(taken) == 1
    reader = host("c")
    for name, snapshot in taken.items():
        holds(reader, snapshot, name.encode(), tmp_path)
    assert {one.snapshot for one in reader.snapshots("vol")} == set(taken.values())
    assert reader.verify().damages == ()
    assert not claims_in(store)


def test_one_host_makes_one_repository_by_two_addresses(
    store: MemoryStore, host: Open, image: Path, tmp_path: Path
) -> None:
    """What was sent by the first is not known at the second, so the host waits for its own claim."""
    held: list[tuple[str, bytes]] = []

    def lose(name: str, data: bytes) -> None:
        if name == "repository":
            held.append((name, data))
            raise StoreError("the outcome is unknown")

    store.before_put = lose
    with pytest.raises(StoreError):
        take(host("a"), image)
    store.before_put = lambda name, data: None
    second = MemoryStore(refuses=False, location="another address")
    second.objects = store.objects
    with pytest.raises(RefusedError, match="making the repository another address"):
        take(Repository(second, LocalState(tmp_path / "a"), create=True), image)
    snapshot = take(host("a"), image)
    store.overwrite(*held[0])
    holds(host("c"), snapshot, b"a", tmp_path)
    assert not claims_in(store)


@pytest.mark.parametrize("moment", ["repository-claim", "repository"])
def test_two_hosts_make_one_repository_for_two_volumes(
    store: MemoryStore, host: Open, tmp_path: Path, moment: str
) -> None:
    paths = {name: write_image(tmp_path / f"{name}.raw", name.encode()) for name in "ab"}
    outcomes = in_the_middle(store, moment, lambda: take(host("b"), paths["b"], "b"))
    try:
        snapshot = take(host("a"), paths["a"], "a")
    except RefusedError:
        snapshot = take(host("a"), paths["a"], "a")
    holds(host("c"), snapshot, b"a", tmp_path)
    if isinstance(outcomes[0], RefusedError):  # the claim of a process that stands still: it is not over
        outcomes = [take(host("b"), paths["b"], "b")]
    holds(host("c"), str(outcomes[0]), b"b", tmp_path)


@pytest.mark.parametrize("moment", ["000001-claim", "000000-stop", "catalog/000001-00000000"])
def test_two_hosts_adopt_one_volume_at_the_same_moment(
    store: MemoryStore, host: Open, image: Path, tmp_path: Path, moment: str
) -> None:
    first = take(host("a"), image)

    def adopt_and_take() -> str:
        repository = host("c")
        repository.adopt("vol")
        return take(repository, image)

    outcomes = in_the_middle(store, moment, adopt_and_take)
    heir = host("b")
    try:
        heir.adopt("vol")
        adopted = True
    except RefusedError:
        adopted = False
    assert adopted != isinstance(outcomes[0], str), outcomes
    kept = {first} | ({str(outcomes[0])} if not adopted else {take(heir, image)})
    reader = host("d")
    assert {one.snapshot for one in reader.snapshots("vol")} == kept
    for snapshot in kept:
        holds(reader, snapshot, b"a", tmp_path)
    assert reader.verify().damages == ()


def test_a_record_that_comes_late_is_the_one_that_was_sent(
    store: MemoryStore, host: Open, image: Path, tmp_path: Path
) -> None:
    """Host a dies with its first record under way. Until that has landed nobody else begins the epoch."""
    held: list[tuple[str, bytes]] = []

    class Killed(BaseException):
        pass

    def kill(name: str, data: bytes) -> None:
        if name.endswith("000000-00000000"):
            held.append((name, data))
            raise Killed

    store.before_put = kill
    with pytest.raises(Killed):
        take(host("a"), image)
    store.before_put = lambda name, data: None
    assert len(claims_in(store)) == 1
    store.now += 59 * 60.0
    words = r"host .* is making volume vol, or was .* or in 3[01] min, .* remove the object vol/"
    with pytest.raises(RefusedError, match=words):
        take(host("b"), image)
    store.overwrite(*held[0])  # just under an hour late
    with pytest.raises(ConflictError, match="belongs to"):
        take(host("b"), image)
    snapshot = take(host("a"), image)
    holds(host("b"), snapshot, b"a", tmp_path)
    host("b").adopt("vol")
    assert not claims_in(store), "what is left over goes with the next adoption"


def test_a_claim_of_a_host_that_is_gone_counts_no_more_after_a_while(
    store: MemoryStore, host: Open, image: Path, tmp_path: Path
) -> None:
    left = claim_name(epoch_stem("vol", 0), "ab" * 16, "cd" * 16)
    host("a").id  # noqa: B018 - makes it
    store.put(left, [b"unreadable, too"])
    store.now += claims.EXPIRES - 60.0
    with pytest.raises(RefusedError, match="another host is making volume vol"):
        take(host("a"), image)
    assert claims_in(store) == [left]
    store.now += 60.0
    holds(host("a"), take(host("a"), image), b"a", tmp_path)
    assert claims_in(store) == []


def test_claims_on_other_epochs_are_no_rivals_and_go_with_the_next_adoption(
    store: MemoryStore, host: Open, image: Path
) -> None:
    take(host("a"), image)
    old, later = (claim_name(epoch_stem("vol", epoch), "ab" * 16, "cd" * 16) for epoch in (0, 2))
    for name in (old, later):
        store.put(name, [b"x"])
    host("b").adopt("vol")
    assert claims_in(store) == [later]


def test_who_was_too_slow_sends_nothing(
    store: MemoryStore, host: Open, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the claim and the record more time goes by than the maker of a claim has."""
    repository = host("a")
    repository.id  # noqa: B018 - makes it
    won = claims.Claim.win

    def win_slowly(claim: claims.Claim, taken: Callable[[], bool]) -> bool:
        answer = won(claim, taken)
        store.now += 601.0
        return answer

    monkeypatch.setattr(claims.Claim, "win", win_slowly)
    with pytest.raises(ConflictError, match="took too long"):
        take(repository, image)
    assert not [name for name in store.objects if name.startswith("vol/")]


def test_what_is_claimed_is_sent_by_puts_that_end_in_time(
    store: MemoryStore, host: Open, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for as long as these puts may take, and for no large object on a slow line."""
    bounded: list[bool] = [False]
    unbounded: list[str] = []

    @contextlib.contextmanager
    def bound_puts() -> Iterator[None]:
        bounded[0] = True
        yield
        bounded[0] = False

    def look(name: str, data: bytes) -> None:
        if not bounded[0]:
            unbounded.append(name.rpartition("/")[2])

    monkeypatch.setattr(store, "bound_puts", bound_puts)
    store.before_put = look
    take(host("a"), image)
    host("b").adopt("vol")
    assert {"repository", "000000-00000000", "000001-00000000"}.isdisjoint(unbounded)
    assert "000000-00000001" in unbounded, "nobody waits for the others"
    assert claims._USED + PUTS_END + HOUR == claims.EXPIRES


def test_a_first_record_of_unknown_outcome_is_sent_again_with_a_new_claim(
    store: MemoryStore, host: Open, image: Path, tmp_path: Path
) -> None:
    take(host("a"), image)

    def fail(name: str, data: bytes) -> None:
        if name.endswith("000001-00000000"):
            raise StoreError("the outcome is unknown")

    store.before_put = fail
    with pytest.raises(StoreError):
        host("b").adopt("vol")
    store.before_put = lambda name, data: None
    (kept,) = claims_in(store)
    with pytest.raises(RefusedError, match="adopting volume vol"):
        host("c").adopt("vol")
    store.now += 2 * HOUR  # it counts no more, and host b may not rely on it
    rival = claim_name(epoch_stem("vol", 1), "ef" * 16, "cd" * 16)
    store.put(rival, [b"x"])
    with pytest.raises(RefusedError):
        host("b").adopt("vol")
    assert "vol/catalog/000001-00000000" not in store.objects
    assert claims_in(store) == sorted([kept, rival])
    store.delete(rival)
    repository = host("b")
    repository.snapshots("vol")
    assert "vol/catalog/000001-00000000" in store.objects
    holds(repository, take(repository, image), b"a", tmp_path)
    assert not claims_in(store)


def test_a_refused_first_record_leaves_no_claim(store: MemoryStore, host: Open, image: Path) -> None:
    from island_fast.errors import StoreFullError

    def full(name: str, data: bytes) -> None:
        if name.endswith("000000-00000000"):
            raise StoreFullError("no room")

    store.before_put = full
    with pytest.raises(StoreFullError):
        take(host("a"), image)
    assert not claims_in(store)


def test_a_store_that_does_not_list_what_was_written_is_not_used(
    store: MemoryStore, host: Open, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryStore, "list", lambda self, prefix: iter(()))
    with pytest.raises(StoreError, match="does not list what was just written"):
        take(host("a"), image)
    assert not claims_in(store)
    assert "repository" not in store.objects


def test_a_repository_that_was_begun_gets_the_id_that_was_sent(
    store: MemoryStore, host: Open, image: Path
) -> None:
    """The first PUT of `repository` is under way when its host dies; it lands after the second one."""
    held: list[tuple[str, bytes]] = []

    def lose(name: str, data: bytes) -> None:
        if name == "repository":
            held.append((name, data))
            raise StoreError("the outcome is unknown")

    store.before_put = lose
    with pytest.raises(StoreError):
        take(host("a"), image)
    store.before_put = lambda name, data: None
    with pytest.raises(RefusedError, match="making the repository memory"):
        take(host("b"), image)
    take(host("a"), image)
    before = store.objects["repository"].data
    store.overwrite(*held[0])
    assert store.objects["repository"].data == before
    assert not claims_in(store)


# -- what is known of the store


def test_the_store_is_asked_once_by_each_host(store: MemoryStore, host: Open, image: Path) -> None:
    with host("a") as repository:
        assert repository.refuses_overwrites is None
        take(repository, image)
        assert repository.refuses_overwrites is False
    with host("a") as repository:
        assert repository.refuses_overwrites is False
        take(repository, image)
    assert store.asked == 1
    with host("b") as repository:
        repository.snapshots()
        assert repository.refuses_overwrites is None, "who only reads asks nothing that is written"
        repository.adopt("vol")
    with host("b") as repository:
        take(repository, image)
    assert store.asked == 2


def test_a_store_that_took_the_place_of_one_that_refuses_is_asked_again(
    store: MemoryStore, host: Open, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloud that moved from Swift to Ceph can have kept its address."""
    store._refuses = True
    with host("a") as repository:
        take(repository, image)
    assert store.asked == 1
    store._refuses = False
    with host("a") as repository:
        assert repository.refuses_overwrites, "what is known of a store that looks the same is believed"
    monkeypatch.setattr(MemoryStore, "seems_to_overwrite", True)
    with host("a") as repository:
        assert repository.refuses_overwrites is None
        take(repository, image)
        assert repository.refuses_overwrites is False
    with host("a") as repository:
        take(repository, image)
    assert store.asked == 2


def test_only_what_is_on_earlier_epochs_of_one_volume_is_left_over(store: MemoryStore) -> None:
    """Who makes a repository lists all of it, and other hosts may have claims there."""
    others = [claim_name(stem, "ab" * 16, "cd" * 16) for stem in ("a/catalog/000000", "z/catalog/000000")]
    for name in others:
        store.put(name, [b"x"])
    store.put("a/packs/1", [b"x"])
    claim = claims.Claim(store, "repository", "12" * 16, "making it")
    assert claim.win(lambda: False)
    claim.fulfil()
    assert sorted(store.objects) == sorted([*others, "a/packs/1"])


def test_an_outage_is_no_answer(store: MemoryStore, host: Open, image: Path) -> None:
    def fail() -> bool:
        raise StoreError("no answer")

    store._try_to_overwrite = fail  # type: ignore[method-assign]
    with host("a") as repository, pytest.raises(StoreError, match="no answer"):
        take(repository, image)
    assert not store.objects


# -- other versions


def test_an_older_version_only_reads(
    store: MemoryStore, host: Open, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = take(host("a"), image)
    for module in (catalog, __import__("island_fast.repository.lineage", fromlist=["x"])):
        monkeypatch.setattr(module, "KNOWN_WRITE_FEATURES", 1)
    holds(host("a"), snapshot, b"a", tmp_path)
    with pytest.raises(UnsupportedObjectError, match="newer island"):
        take(host("a"), image)
    with pytest.raises(UnsupportedObjectError, match="newer island"):
        host("b").adopt("vol")


def test_a_lineage_of_an_older_version_gets_the_bit_with_the_next_record(
    store: MemoryStore, host: Open, image: Path, tmp_path: Path
) -> None:
    store._refuses = True  # as an older version takes it
    first = take(host("a"), image)
    lineage = host("a").existing_lineage("vol")
    assert not lineage._at.write_features & CLAIMED
    store._refuses = False
    (known,) = (tmp_path / "a").glob("*/repository")
    known.unlink()  # an older version asked nothing
    second = take(host("a"), image)
    lineage = host("a").existing_lineage("vol")
    assert lineage._at.write_features & CLAIMED
    for snapshot in (first, second):
        holds(host("c"), snapshot, b"a", tmp_path)


def test_resumed_attempts_do_not_meet_those_that_local_state_forgot(
    store: MemoryStore, host: Open, image: Path
) -> None:
    from island_fast.repository.local_state import Registration
    from island_fast.repository.snapshot_writer import next_attempt

    take(host("a"), image)
    lineage = host("a").existing_lineage("vol")
    found = {next_attempt(lineage, Registration("ab" * 16, 3, None)) for _ in range(50)}
    assert len(found) > 40
    assert all(4 <= one < 4 + (1 << 12) for one in found)


@pytest.fixture(autouse=True)
def _calm(store: MemoryStore) -> Iterator[None]:
    yield
    store.before_put = lambda name, data: None
