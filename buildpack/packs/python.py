"""Builds a Python app: its interpreter, a virtual environment below `.hostd/python`, its requirements.

The version comes from `.python-version`, `runtime.txt` or `requires-python`; the stack's own Python is taken
when it fits, otherwise one of uv's managed builds where those can be reached. Refuses a version that
cannot be had, naming those that can. Standard library and `uv` (or else `venv` and `pip`) only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from buildpack import output
from buildpack.packs import contract
from buildpack.refusals import BuildRefused

STACK_PYTHON = "/usr/bin/python3"
_SOURCES = ("uv.lock", "requirements.txt", "pyproject.toml", "setup.py")
_FOREIGN = {"Pipfile": "pipenv requirements", "poetry.lock": "poetry export"}
_PROFILE = """\
export VIRTUAL_ENV="$HOME/.hostd/python"
export PATH="$VIRTUAL_ENV/bin:$PATH"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$HOME"
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
export LANG="${LANG:-C.UTF-8}"
"""


def detect(app: Path) -> str | None:
    """Take an app with one of Python's dependency files."""
    return "Python" if any((app / name).is_file() for name in (*_SOURCES, *_FOREIGN)) else None


def compile(shop: contract.Workshop) -> None:
    """Make the virtual environment and fill it."""
    environment = _environment(shop)
    interpreter = provide_python(shop, environment)
    make_environment(shop, interpreter, environment)
    install_requirements(shop, environment)
    collect_static(shop, environment)
    output.step("Building runtime environment")
    shop.write_profile("python", _PROFILE)


def release(app: Path) -> Mapping[str, str]:
    """Know no default: only a Procfile says how a Python app serves."""
    return {}


def _environment(shop: contract.Workshop) -> dict[str, str]:
    taken = {name: value for name, value in shop.app_environment.items() if name != "PORT"}
    home = shop.app / ".hostd" / "python"
    return {
        **taken,
        **shop.environment,
        "VIRTUAL_ENV": str(home),
        "PATH": f"{home / 'bin'}{os.pathsep}{shop.environment.get('PATH', '/usr/local/bin:/usr/bin:/bin')}",
        "PIP_CACHE_DIR": str(shop.cache / "pip"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "UV_CACHE_DIR": str(shop.cache / "uv"),
        "UV_PYTHON_INSTALL_DIR": str(shop.app / ".hostd" / "pythons"),
        "UV_PROJECT_ENVIRONMENT": str(home),
        "UV_LINK_MODE": "copy",
        "UV_NO_PROGRESS": "1",
    }


def wanted_version(app: Path) -> tuple[str, str]:
    """Return the version that the app asks for (`3.12`, `3.11.4` or `>=3.10,<4`) and the file that says so.

    Raises:
        BuildRefused: the file does not say a version.
    """
    for name in (".python-version", "runtime.txt"):
        if (app / name).is_file():
            lines = [line.split("#")[0].strip() for line in (app / name).read_text("utf-8", "replace").splitlines()]
            text = next((line for line in lines if line), "")
            version = re.fullmatch(r"(?:(?:c?python-?)?)(3(?:\.\d+){0,2})", text, re.IGNORECASE)
            if version is None:
                raise BuildRefused(f"{name}: {text[:60]!r} is no Python version", "for example 3.11 or python-3.11.2")
            return version[1], name
    required = _section(read_pyproject(app), "project").get("requires-python")
    return (required.strip(), "pyproject.toml") if isinstance(required, str) else ("", "")


def read_pyproject(app: Path) -> dict[str, Any]:
    """Return pyproject.toml, empty if there is none.

    Raises:
        BuildRefused: it does not parse.
    """
    try:
        return tomllib.loads((app / "pyproject.toml").read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BuildRefused(f"pyproject.toml does not parse: {error}") from error


def _section(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = table.get(name)
    return section if isinstance(section, dict) else {}


def satisfies(version: str, wanted: str) -> bool:
    """Say whether `3.11.2` fits `3`, `3.11`, `3.11.2`, or a list such as `>=3.10,<4,!=3.11.1`."""
    have = _numbers(version)
    for clause in wanted.split(","):
        match = re.fullmatch(r"\s*(==|!=|<=|>=|<|>|~=|===|)\s*(\d+(?:\.\d+)*)(\.\*)?\s*", clause)
        if match is None:
            return False
        need = _numbers(match[2])
        if not _fits(have, match[1] or "==", need, is_prefix=bool(match[3]) or not match[1]):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _fits(have: tuple[int, ...], operator: str, need: tuple[int, ...], *, is_prefix: bool) -> bool:
    padded = need + (0,) * (len(have) - len(need))
    is_same = have[: len(need)] == need if is_prefix else have == padded
    match operator:
        case "==" | "===":
            return is_same
        case "!=":
            return not is_same
        case "~=":
            return have >= padded and have[: len(need) - 1] == need[:-1]
        case ">=":
            return have >= padded
        case "<=":
            return have <= padded
        case ">":
            return have > padded
    return have < padded


def provide_python(shop: contract.Workshop, environment: Mapping[str, str]) -> str:
    """Return the interpreter to use: the stack's, or one of uv's put into the app.

    Raises:
        BuildRefused: no version that fits can be had.
    """
    own = _version_of(STACK_PYTHON)
    wanted, source = wanted_version(shop.app)
    if not wanted:
        output.step(f"No Python version was specified: using the stack's, {own}")
        return STACK_PYTHON
    output.step(f"Python {wanted} specified in {source}")
    if satisfies(own, wanted):
        output.step(f"Using Python {own}")
        return STACK_PYTHON
    return _managed_python(shop, wanted, own, environment)


def _version_of(interpreter: str) -> str:
    answer = subprocess.run(
        [interpreter, "-SIc", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.strip()


def _managed_python(shop: contract.Workshop, wanted: str, own: str, environment: Mapping[str, str]) -> str:
    uv = shutil.which("uv", path=shop.environment.get("PATH"))
    refusal = BuildRefused(
        f"Python {wanted} cannot be had here",
        f"there is {own} (the stack's own){_offered(uv, environment)}",
    )
    if uv is None:
        raise refusal
    output.step(f"Installing Python {wanted}")
    kept, target = shop.cache / "pythons", shop.app / ".hostd" / "pythons"
    target.parent.mkdir(parents=True, exist_ok=True)
    if kept.is_dir():
        shutil.copytree(kept, target, symlinks=True, dirs_exist_ok=True)
    status = output.follow(
        [uv, "python", "install", "--no-bin", wanted], cwd=shop.cache, environment=environment, silent=True
    )
    found = subprocess.run(
        [uv, "python", "find", "--managed-python", "--no-project", wanted],
        cwd=shop.cache,
        env=dict(environment) | {"VIRTUAL_ENV": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if status != 0 or found.returncode != 0:
        raise refusal
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(target, kept, symlinks=True)
    output.step(f"Using Python {_version_of(found.stdout.strip())}")
    return found.stdout.strip()


def _offered(uv: str | None, environment: Mapping[str, str]) -> str:
    """Name the newest of each minor version that uv could install where its downloads can be reached."""
    if uv is None:
        return ""
    answer = subprocess.run(
        [uv, "python", "list", "--only-downloads"], env=dict(environment), capture_output=True, text=True, check=False
    )
    versions = re.findall(r"^cpython-(3\.\d+\.\d+)-", answer.stdout, re.MULTILINE)
    return f"; where uv's downloads can be reached also {', '.join(dict.fromkeys(versions))}" if versions else ""


def make_environment(shop: contract.Workshop, interpreter: str, environment: Mapping[str, str]) -> None:
    """Make the virtual environment at the place that it keeps in the slug."""
    home = shop.app / ".hostd" / "python"
    shutil.rmtree(home, ignore_errors=True)
    uv = shutil.which("uv", path=shop.environment.get("PATH"))
    command = (
        [uv, "venv", "--quiet", "--no-project", "--python", interpreter, str(home)]
        if uv
        else [interpreter, "-m", "venv", str(home)]
    )
    clean = {name: value for name, value in environment.items() if name != "VIRTUAL_ENV"}
    output.run(command, cwd=shop.app, environment=clean, otherwise="the virtual environment cannot be made")


def install_requirements(shop: contract.Workshop, environment: Mapping[str, str]) -> None:
    """Install from the first of uv.lock, requirements.txt, pyproject.toml, setup.py.

    Raises:
        BuildRefused: none of them is there, or the installation fails.
    """
    app = shop.app
    source = next((name for name in _SOURCES if (app / name).is_file()), "")
    if not source:
        foreign = next(name for name in _FOREIGN if (app / name).is_file())
        raise BuildRefused(
            f"{foreign} alone is not understood", f"write requirements.txt: {_FOREIGN[foreign]} > requirements.txt"
        )
    uv = shutil.which("uv", path=shop.environment.get("PATH"))
    output.step(f"Installing requirements from {source}")
    output.run(
        _install_command(uv, source, str(app / ".hostd" / "python" / "bin" / "python")),
        cwd=app,
        environment=environment,
        otherwise=f"the requirements in {source} cannot be installed",
        hint="the installer's words are above",
    )


def _install_command(uv: str | None, source: str, interpreter: str) -> list[str]:
    what = ["-r", source] if source == "requirements.txt" else ["."]
    if uv is None:
        return [interpreter, "-m", "pip", "install", "--quiet", *what]
    if source == "uv.lock":
        return [uv, "sync", "--frozen", "--no-dev", "--no-editable", "--compile-bytecode"]
    return [uv, "pip", "install", "--compile-bytecode", *what]


def collect_static(shop: contract.Workshop, environment: Mapping[str, str]) -> None:
    """Collect a Django project's static files, as Heroku's buildpack does."""
    manage = shop.app / "manage.py"
    packages = (shop.app / ".hostd" / "python" / "lib").glob("python*/site-packages/django")
    is_off = shop.app_environment.get("DISABLE_COLLECTSTATIC", "0") not in ("", "0")
    if not manage.is_file() or not any(packages) or is_off:
        return
    output.step("python manage.py collectstatic --noinput")
    output.run(
        [str(shop.app / ".hostd" / "python" / "bin" / "python"), "manage.py", "collectstatic", "--noinput"],
        cwd=shop.app,
        environment=environment,
        otherwise="collectstatic failed",
        hint="set DISABLE_COLLECTSTATIC=1 to leave it out: flynn env set DISABLE_COLLECTSTATIC=1",
    )


if __name__ == "__main__":
    contract.main(detect, compile, release)
