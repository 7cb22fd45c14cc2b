"""Finds the buildpack that takes an app: the one that `BUILDPACK_URL` names, else the first built-in that says yes.

A buildpack is Heroku's contract: `bin/detect BUILD` prints a name and exits 0, `bin/compile BUILD CACHE ENV`
does the work, `bin/release BUILD` prints default process types. Ours are Python modules spoken to in the
same way. Refuses an app that nobody takes and a buildpack that is none. Called by `compile`; standard
library only.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from buildpack import output
from buildpack.refusals import BuildRefused

BUILT_IN = ("nodejs", "python", "static")
_DETECT_TIMEOUT_S = 120.0
_GIT_URL = re.compile(r"(?:https?|git|ssh|file)://.+|[\w.-]+@[\w.-]+:.+")


@dataclass(frozen=True)
class Pack:
    """A buildpack; `folder` is None for one of ours."""

    name: str
    folder: Path | None = None

    def command(self, verb: str, *arguments: Path) -> list[str]:
        """Return the command line of one of the three programs."""
        program = (
            [sys.executable, "-P", "-m", f"buildpack.packs.{self.name}", verb]  # -P: the app's folder is no library
            if self.folder is None
            else [str(self.folder / "bin" / verb)]
        )
        return [*program, *map(str, arguments)]

    def module(self) -> ModuleType:
        """Return the module of one of ours."""
        return importlib.import_module(f"buildpack.packs.{self.name}")

    def environment(self, outer: Mapping[str, str]) -> dict[str, str]:
        """Return what its programs are started with: ours also find our code."""
        ours = {} if self.folder is not None else {"PYTHONPATH": str(Path(__file__).parent.parent)}
        return {**outer, **ours}

    def has(self, verb: str) -> bool:
        """Return whether the program exists and can be run."""
        return self.folder is None or os.access(self.folder / "bin" / verb, os.X_OK)


@dataclass(frozen=True)
class Detected:
    """A buildpack that takes the app, and the name that it gives to what it saw."""

    pack: Pack
    shown: str


def choose(app: Path, work: Path, url: str, environment: Mapping[str, str]) -> Detected:
    """Return the buildpack for the app; one that is fetched from a `url` is put below `work`.

    Raises:
        BuildRefused: none takes it.
    """
    if url:
        pack = _custom(app, work, url, environment)
        shown = _ask(pack, app, environment)
        if shown is None:
            raise BuildRefused(f"the buildpack {_public(url)} does not take this app", "see its bin/detect")
        return Detected(pack, shown)
    for name in BUILT_IN:
        shown = _ask(Pack(name), app, environment)
        if shown is not None:
            return Detected(Pack(name), shown)
    raise BuildRefused(
        "no buildpack takes this app: nothing to build was found in the root of the repository",
        "it needs one of package.json (Node.js), requirements.txt or pyproject.toml (Python), "
        "index.html or Staticfile (static), or BUILDPACK_URL: flynn env set BUILDPACK_URL=…",
    )


def _ask(pack: Pack, app: Path, environment: Mapping[str, str]) -> str | None:
    if pack.folder is None:  # ours need no process of their own to look at a few files
        answer_of_ours: str | None = pack.module().detect(app)
        return answer_of_ours
    try:
        answer = subprocess.run(
            pack.command("detect", app),
            cwd=app,
            env=pack.environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_DETECT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildRefused(f"the buildpack's bin/detect cannot be run: {error}") from error
    if answer.returncode != 0:
        return None
    lines = answer.stdout.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else pack.name


def _custom(app: Path, work: Path, url: str, environment: Mapping[str, str]) -> Pack:
    folder = _clone(work, url, environment) if _GIT_URL.fullmatch(url) else _inside(app, url)
    pack = Pack(folder.name, folder)
    for verb in ("detect", "compile"):
        if not pack.has(verb):
            raise BuildRefused(
                f"BUILDPACK_URL: {_public(url)} is no buildpack: bin/{verb} is missing or not executable",
                "see Heroku's buildpack API",
            )
    return pack


def _inside(app: Path, path: str) -> Path:
    folder = (app / path.lstrip("/")).resolve()
    if not folder.is_relative_to(app.resolve()) or not folder.is_dir():
        raise BuildRefused(
            f"BUILDPACK_URL: {path!r} is neither a git URL nor a folder of this repository",
            "for example https://HOST/buildpack.git#v1 or ./buildpack",
        )
    return folder


def _clone(work: Path, url: str, environment: Mapping[str, str]) -> Path:
    address, _, reference = url.partition("#")
    output.step(f"Fetching buildpack {_public(url)}")
    folder = work / "buildpack"
    branch = ["--branch", reference] if reference else []
    output.run(
        ["git", "clone", "--quiet", "--depth", "1", "--recurse-submodules", *branch, "--", address, str(folder)],
        cwd=work,
        environment={**environment, "GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes"},
        otherwise=f"BUILDPACK_URL: {_public(url)} cannot be cloned",
        hint="the builder must be able to reach it; a folder of the repository works without a network",
    )
    return folder


def _public(url: str) -> str:
    """Take credentials out of a URL before it is shown."""
    return re.sub(r"//[^/@]+@", "//", url)
