"""Incremental snapshots of qcow2 volumes, kept whole in OpenStack Swift or a directory.

`Repository` is the Python API, `Keep` a retention policy for it: docs/api.md. What verbs answer is in
`island_fast.results`, what they raise in `island_fast.errors`, what they tell meanwhile in
`island_fast.progress`. Everything else may change with any version.
"""

from typing import TYPE_CHECKING

__all__ = ["Keep", "Repository", "__version__"]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from island_fast.api import Repository
    from island_fast.operations.retain import Keep
else:

    def __getattr__(name: str) -> object:
        """Import what is asked for only now: it takes a good part of a second."""
        if name == "Repository":
            from island_fast.api import Repository

            return Repository
        if name == "Keep":
            from island_fast.operations.retain import Keep

            return Keep
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
