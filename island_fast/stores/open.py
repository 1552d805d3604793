"""Stores: where objects go. The only door to them is `open_store`."""

from __future__ import annotations

from island_fast.arrays import Buffer
from island_fast.errors import UsageError
from island_fast.stores.base import ObjectInfo, Range, Store
from island_fast.stores.directory import DirectoryStore

__all__ = ["Buffer", "ObjectInfo", "Range", "Store", "open_store"]


def open_store(url: str, *, create_ok: bool = False, variables: str = "") -> Store:
    """The store that `url` names: a directory's path, or swift://CONTAINER[/PREFIX].

    With `create_ok` a directory that does not exist is made, with the first object put into it;
    without, it is a NotFoundError. A container is never made. Swift's credentials come from the
    environment, from the usual variables with `variables` in front of their names, and are tried at once.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "swift" and separator:
        # Imported here: it takes a good part of a second, which users of directories need not wait.
        from island_fast.stores.swift import SwiftStore

        return SwiftStore.open(rest, variables=variables)
    if not url or separator or url.startswith("swift:"):
        raise UsageError(f"{url!r} is no repository; give a directory's path or swift://CONTAINER/PREFIX")
    return DirectoryStore(url, create_ok=create_ok)
