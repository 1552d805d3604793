"""Build the one compiled module; everything else is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

debug = bool(os.environ.get("ISLAND_FAST_DEBUG"))

kernels = Extension(
    "island_fast._diff",
    ["island_fast/_diff.pyx"],
    extra_compile_args=["-O1", "-g"] if debug else ["-O3", "-g0", "-Wall", "-Wextra"],
)

setup(
    ext_modules=cythonize(
        [kernels],
        compiler_directives={
            "language_level": "3",
            "boundscheck": debug,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": debug,
        },
    )
)
