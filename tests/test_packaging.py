"""What `pip install .` installs is the whole package, and works without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_wheel_holds_every_module_and_runs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [n for n in listed.stdout.split() if n.startswith(("island_fast/", "man/"))] or [
        str(p.relative_to(ROOT))
        for p in [*(ROOT / "island_fast").rglob("*.p*"), *(ROOT / "man").glob("*.1")]
        if "__pycache__" not in p.parts
    ]
    for name in [*names, "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(pip, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
        inside = set(archive.namelist())
    modules = {name for name in names if name.endswith((".py", ".pyi", "py.typed", ".filters"))}
    assert modules <= inside
    pages = {name.removeprefix("man/") for name in names if name.startswith("man/")}
    assert "island.1" in pages
    assert pages == {Path(name).name for name in inside if ".data/data/share/man/man1/" in name}
    environment = os.environ | {"PYTHONPATH": str(installed)}
    program = "import island_fast.repository as r; print(r.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(installed))
