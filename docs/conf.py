"""How Sphinx makes the site: `make docs`. A broken link or anchor fails it."""

import re
from pathlib import Path

project = "island"
copyright = ""
html_show_copyright = False
release = re.findall(
    r'__version__ = "(.*)"', (Path(__file__).parents[1] / "island_fast/__init__.py").read_text()
)[0]

extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "alabaster"
html_title = f"island {release}"
html_theme_options = {"page_width": "1080px", "sidebar_width": "200px", "fixed_sidebar": True}
html_copy_source = False
