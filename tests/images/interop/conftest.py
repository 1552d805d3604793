"""The images, made once for all tests here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.images.interop.images import RECIPES, Made, make


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every image by its recipe's name."""
    folder = tmp_path_factory.mktemp("interop")
    with ThreadPoolExecutor(3) as pool:
        made = pool.map(lambda recipe: make(recipe, folder), RECIPES)
        return {recipe.name: one for recipe, one in zip(RECIPES, made, strict=True)}
