"""The figures of scripts/house.py for a package that is small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import house

FILES = {
    "__init__.py": "from island_fast.front import show\n__version__ = '1'\n",
    "__main__.py": "import island_fast.front\n",
    "front.py": (
        "from typing import TYPE_CHECKING\n"
        "from island_fast import __version__, _fast\n"
        "if TYPE_CHECKING:\n"
        "    from island_fast.mending import mend\n"
        "def show(x):\n"
        '    """Show it."""\n'
        "    return _once(_twice(_twice(x)))\n"
        "def _once(x):\n"
        '    """The only one."""\n'
        "    def inner():\n"
        '        """Nothing that counts."""\n'
        "        return _once(x)\n"
        "    return inner\n"
        "def _twice(x):\n"
        '    """Frame of a picture."""\n'
    ),
    "mending.py": (
        "import island_fast.low.deep as deep\ndef mend():\n    from island_fast.low.deep.lowest import Low\n"
    ),
    "low/__init__.py": "",
    "low/deep/lowest.py": (
        "from ... import mending\n"
        "from island_fast.base import f\n"
        "class Low:\n"
        "    _twice = 1\n"
        "    @property\n"
        "    def _held(self):\n"
        '        """Frame `self`."""\n'
        "        return self._twice\n"
    ),
    "base.py": "def f(low):\n    '''Tell of it.'''\n    return low._held\n",
    "_fast.pyx": "def fast(): pass\n",
    "etc/filters": "",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "island_fast" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_figures_are_exact(root: Path) -> None:
    assert house.count(root) == {
        "modules": 3,
        "ing": 1,
        "compiled": ["_fast.pyx"],
        "rooms": {"low": 1},
        "floors": 4,
        "chain": [["__main__"], ["front"], ["low", "mending"], ["base"]],
        "cycles": [["low", "mending"]],
        "functions": 6,
        "lines_median": 3,
        "lines_p90": 6,
        "lines_longest": 6,
        "private": 3,
        "private_percent": 50.0,
        "private_used_once": 2,
        "private_used_once_percent": 33.3,
        "docstrings": 5,
        "verbs": 3,
        "verbs_percent": 60.0,
        "see": 0,
    }
    assert "chain: __main__ > front > {low, mending} > base" in house.make_table(house.count(root))


def test_docstrings_without_a_verb_are_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    house.main([str(root), "--nouns"])
    assert capsys.readouterr().out.splitlines() == [
        "island_fast/front.py:8 _once: The only one.",
        "island_fast/front.py:14 _twice: Frame of a picture.",
    ]
