"""Reads the image recipes beside this file: which packages and layers make an image.

A recipe is TOML: `about`, `extends` (an image whose layers come below), `packages` (Debian's), `layers` (of
`tools`, `deps`, `code`, in this order on top), `wheels` (for the `tools` layer) and `env`. Unknown keys are errors.
Called by `rootfs.images`.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from rootfs.errors import BuildFailed, ImageMissing
from rootfs.types import ImageConfig

RECIPES = Path(__file__).parent / "recipes"
_FORMAT = "1"  # changes when the way in which layers are made does, so that cached ones are not taken for new

ExtraLayer = Literal["tools", "deps", "code"]


class Wheel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files out of one wheel: `files` from a path in it (or a folder, with `/`) to one in the image."""

    requirement: str
    files: dict[str, str]
    links: dict[str, str] = {}


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    about: str
    extends: str = ""
    packages: tuple[str, ...] = ()
    layers: tuple[ExtraLayer, ...] = ()
    wheels: tuple[Wheel, ...] = ()
    env: dict[str, str] = {}


def load(folder: Path = RECIPES) -> dict[str, Recipe]:
    """Return all recipes by name, each after the one that it extends.

    Raises:
        BuildFailed: one does not parse, or extends what is not there.
    """
    found = {path.stem: _read(path) for path in sorted(folder.glob("*.toml"))}
    ordered: dict[str, Recipe] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path or name not in found:
            raise BuildFailed(f"recipe {path[-1]} extends {name!r}, which is itself or not there")
        if found[name].extends:
            visit(found[name].extends, (*path, name))
        ordered[name] = found[name]

    for name in found:
        visit(name, ())
    return ordered


def _read(path: Path) -> Recipe:
    try:
        return msgspec.convert({**tomllib.loads(path.read_text()), "name": path.stem}, Recipe)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BuildFailed(f"recipe {path}: {error}") from error


def chosen(recipes: Mapping[str, Recipe], names: Iterable[str] | None) -> list[Recipe]:
    """Return the named recipes (all if `None`) and those they stand on, lower ones first.

    Raises:
        ImageMissing: there is no recipe of that name.
    """
    wanted: set[str] = set()
    for name in recipes if names is None else names:
        if name not in recipes:
            raise ImageMissing(f"no recipe for image {name!r}", hint="there are: " + ", ".join(sorted(recipes)))
        wanted.update(recipe.name for recipe in lineage(recipes, name))
    return [recipe for name, recipe in recipes.items() if name in wanted]


def lineage(recipes: Mapping[str, Recipe], name: str) -> list[Recipe]:
    """Return a recipe and all that it stands on, lowest first."""
    recipe = recipes[name]
    return [*(lineage(recipes, recipe.extends) if recipe.extends else []), recipe]


def all_packages(recipes: Mapping[str, Recipe], name: str) -> list[str]:
    """Return every package that the image has, also those of the images below."""
    return sorted({package for recipe in lineage(recipes, name) for package in recipe.packages})


def config_of(recipes: Mapping[str, Recipe], name: str) -> ImageConfig:
    """Return the image's configuration: the environment of the whole lineage, upper ones win."""
    env: dict[str, str] = {}
    for recipe in lineage(recipes, name):
        env.update(recipe.env)
    return ImageConfig(env=env)


def packages_key(recipes: Mapping[str, Recipe], name: str, suite: str, machine: str) -> str:
    """Return the cache key of an image's package layer: same key, same content (but for Debian's own updates)."""
    packages = [recipe.packages for recipe in lineage(recipes, name)]
    return key_of("packages", suite, machine, msgspec.json.encode(packages).decode())


def key_of(*parts: str) -> str:
    """Return a short hash over texts and the format of this builder."""
    return hashlib.sha256("\0".join((_FORMAT, *parts)).encode()).hexdigest()[:16]
