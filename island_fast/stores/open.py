"""From a URL to a store."""

from __future__ import annotations

from island_fast.errors import UsageError
from island_fast.stores.base import Store
from island_fast.stores.directory import DirectoryStore

__all__ = ["open_store"]


def open_store(url: str, *, create_ok: bool = False, shared: bool = False, variables: str = "") -> Store:
    """Open the store that `url` names: a directory's path, or swift://CONTAINER[/PREFIX].

    A directory that does not exist is a NotFoundError; with `create_ok` the first object that is put creates
    it, with `shared` so that its group may read what is stored. A container is never created. Swift's
    credentials are in the usual environment variables, with `variables` in front of their names, and are used
    to sign in at once.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "swift" and separator:
        # Importing this takes a good part of a second, which users of directories need not wait for.
        from island_fast.stores.swift import SwiftStore

        if shared:
            raise UsageError("--shared is for a directory; who may read a container is in its access list")
        return SwiftStore.open(rest, variables=variables)
    if not url or separator or url.startswith("swift:"):
        raise UsageError(
            f"{url!r} is not a repository address; give a directory's path or swift://CONTAINER/PREFIX"
        )
    return DirectoryStore(url, create_ok=create_ok, shared=shared)
