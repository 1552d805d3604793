"""Run by test_interface.py in a process of its own, because Cinder patches what it is imported into.

Prints one line for each thing about the driver's signatures that is not as Cinder calls it.
"""

import importlib
import inspect
import pkgutil

from cinder import interface, objects

objects.register_all()

from cinder.volume import driver as cinder_driver  # noqa: E402

from island_fast.driver import IslandDriver  # noqa: E402

NEVER = {"VolumeConsistencyGroupDriver", "VolumeGroupDriver"}
"""Interfaces of what is not supported."""


def classes():
    """Every class of Cinder's interface of volume drivers."""
    for module in pkgutil.iter_modules(interface.__path__):
        if module.name.startswith("volume"):
            found = importlib.import_module(f"cinder.interface.{module.name}")
            yield from (
                one
                for one in vars(found).values()
                if inspect.isclass(one) and one.__module__ == found.__name__ and one.__name__ not in NEVER
            )


def compare():
    """What differs: every method must take what the interface says, and be more than a refusal."""
    seen = 0
    for one in classes():
        for name, wanted in vars(one).items():
            if not inspect.isfunction(wanted):
                continue
            seen += 1
            mine = inspect.getattr_static(IslandDriver, name)
            if isinstance(mine, property):
                continue
            theirs = inspect.getfullargspec(wanted)
            ours = inspect.getfullargspec(mine)
            inherited = getattr(cinder_driver.VolumeDriver, name) is mine
            same = ours.args == theirs.args or (inherited and len(ours.args) == len(theirs.args))
            if not same or ours.defaults != theirs.defaults or ours.kwonlyargs:
                print(f"{one.__name__}.{name}: {ours} is not {theirs}")
            if "raise NotImplementedError" in inspect.getsource(mine):
                print(f"{one.__name__}.{name} is not there")
    assert seen > 30, seen


compare()
