"""Recipes: the ones we ship, and how they stand on each other."""

from pathlib import Path

import pytest

from rootfs import recipes
from rootfs.errors import BuildFailed, ImageMissing


def test_shipped_recipes_load_with_lower_ones_first() -> None:
    found = recipes.load()
    assert {"base", "system", "stack", "build"} <= set(found)
    names = list(found)
    assert all(names.index(recipe.extends) < names.index(name) for name, recipe in found.items() if recipe.extends)


def test_choosing_takes_what_lies_below() -> None:
    found = recipes.load()
    assert [recipe.name for recipe in recipes.chosen(found, ["build"])] == ["base", "stack", "build"]
    assert len(recipes.chosen(found, None)) == len(found)
    with pytest.raises(ImageMissing, match="nosuch"):
        recipes.chosen(found, ["nosuch"])


def test_environment_is_inherited_and_overridden() -> None:
    env = recipes.config_of(recipes.load(), "build").env
    assert env["LANG"] == "C.UTF-8"
    assert env["PYTHONPATH"] == "/opt/hostd/code"
    assert env["NODE_EXTRA_CA_CERTS"].startswith("/etc/ssl")


def test_key_changes_with_packages_below_and_suite() -> None:
    found = recipes.load()
    key = recipes.packages_key(found, "stack", "bookworm", "x86_64")
    assert key == recipes.packages_key(found, "stack", "bookworm", "x86_64")
    assert key != recipes.packages_key(found, "stack", "trixie", "x86_64")
    assert key != recipes.packages_key(found, "stack", "bookworm", "aarch64")
    assert key != recipes.packages_key(found, "system", "bookworm", "x86_64")


@pytest.mark.parametrize(
    "text",
    ["about = 1", "about = 'x'\npakages = []", "not toml", "about = 'x'\nextends = 'a'", "about = 'x'\nlayers = ['z']"],
)
def test_wrong_recipes_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(BuildFailed, match="recipe"):
        recipes.load(tmp_path)
