"""Stores that stand before another one: what they do not pass on would be answered by the base class."""

from __future__ import annotations

from island_fast.bench.counting_store import CountingStore
from island_fast.stores.base import Store
from island_fast.stores.forwarding import ForwardingStore
from tests.support.memory_store import MemoryStore

OF_THE_WRAPPER = {"use_workers", "refuses_overwrites", "on_answer"}  # what these do goes through the others


def test_all_of_a_store_is_passed_on() -> None:
    names = {name for name in vars(Store) | Store.__annotations__ if not name.startswith("_")}
    store = ForwardingStore(MemoryStore())
    assert names - set(vars(ForwardingStore)) - set(vars(store)) == OF_THE_WRAPPER


def test_a_counted_peek_is_one_request() -> None:
    store = CountingStore(MemoryStore())
    assert store.peek("absent") is None
    assert store.requests == 1
