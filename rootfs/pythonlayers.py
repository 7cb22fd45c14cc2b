"""Collects the files of the layers that hold Python and tools: our code, what it stands on, and wheels.

`code` is our packages as they lie in the repository or in site-packages; `deps` the distributions that they
require, taken from where the running interpreter has them, so that jobs run what was tested here; `tools` are
files out of wheels that pip fetches. Byte code is compiled in advance and never checked against times (nobody
could write it in a job). Called by `rootfs.images`.

Source: PEP 552 (unchecked hash-based .pyc), PEP 376/427 (RECORD, wheels), PEP 508 (requirements).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from rootfs.errors import BuildFailed
from rootfs.recipes import Wheel

PACKAGES = ("buildpack", "controller", "discovery", "hostd", "netns", "rootfs", "router")
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_CODE_ROOT, _DEPS_ROOT = "opt/hostd/code", "opt/hostd/deps"
_LEFT_OUT = frozenset({".c", ".h", ".pxd", ".pyc", ".pyi", ".pyx"})
_REQUIREMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

LayerFile = tuple[str, bytes | str, int]


def code_files(root: Path) -> list[LayerFile]:
    """Return our packages' files under `/opt/hostd/code`, without byte code."""
    found: list[LayerFile] = []
    for package in PACKAGES:
        if not (root / package / "__init__.py").is_file():
            raise BuildFailed(f"{root} has no package {package}", hint="give the repository or a site-packages folder")
        found += [(f"{_CODE_ROOT}/{path.relative_to(root)}", *_read(path)) for path in _walk(root / package)]
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name != "__pycache__":
                yield from _walk(path)
        elif path.suffix != ".pyc":
            yield path


def _read(path: Path) -> tuple[bytes | str, int]:
    if path.is_symlink():
        return os.readlink(path), 0o777  # noqa: PTH115 — its text, not a path
    return path.read_bytes(), 0o755 if path.stat().st_mode & 0o111 else 0o644


def deps() -> list[metadata.Distribution]:
    """Return all distributions that ours requires, however far down, by name.

    Raises:
        BuildFailed: one is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    waiting = [("hostd", False)]
    while waiting:
        name, is_optional = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            if is_optional:
                continue  # its marker speaks of another Python or system
            hint = "install our package with the Python that runs this, e.g. `pip install -e .`"
            raise BuildFailed(f"{name} is not installed for {sys.executable}", hint=hint) from error
        for requirement in found[key].requires or []:
            match = _REQUIREMENT_NAME.match(requirement)
            if match and "extra ==" not in requirement:
                waiting.append((match[0], ";" in requirement))
    del found["hostd"]
    return [found[key] for key in sorted(found)]


def deps_files(distributions: Iterable[metadata.Distribution]) -> list[LayerFile]:
    """Return the distributions' files under `/opt/hostd/deps`, without byte code, scripts and C sources.

    Raises:
        BuildFailed: a distribution has no files that can be found.
    """
    found: list[LayerFile] = []
    for distribution in distributions:
        inside = [file for file in distribution.files or [] if ".." not in file.parts and not file.is_absolute()]
        # `../../bin/x` is a script of the venv; what pip built from a source archive lists files that it left out.
        paths = {str(file): Path(str(file.locate())) for file in inside if file.suffix not in _LEFT_OUT}
        present = {name: path for name, path in paths.items() if path.is_file()}
        if not any(name.endswith((".py", ".so")) for name in present):
            raise BuildFailed(f"{distribution.name} is installed without its files", hint="install it again with pip")
        found += [(f"{_DEPS_ROOT}/{name}", *_read(path)) for name, path in present.items()]
    return found


def compiled(files: Iterable[LayerFile]) -> list[LayerFile]:
    """Return the files and the byte code of every module among them, made by a fresh interpreter.

    A fresh one with a fixed hash seed, because the bytes depend on what the interpreter has seen before.
    """
    found = list(files)
    with tempfile.TemporaryDirectory(prefix="hostd-compile-") as folder:
        root = Path(folder)
        for name, content, _ in found:
            if name.endswith(".py") and isinstance(content, bytes):
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        command = [sys.executable, "-ISm", "compileall", "-qq", "--invalidation-mode", "unchecked-hash"]
        # Some distributions carry templates that are no valid Python; what does not compile has no byte code.
        subprocess.run(
            [*command, "-s", folder, "-p", "/", folder], env={**os.environ, "PYTHONHASHSEED": "0"}, check=False
        )
        for path in sorted(root.rglob("*.pyc")):
            found.append((str(path.relative_to(root)), path.read_bytes(), 0o644))
    return found


def hash_of(files: Iterable[LayerFile]) -> str:
    """Return a hash over names, contents and modes."""
    digest = hashlib.sha256()
    for name, content, mode in sorted(files):
        raw = content.encode() if isinstance(content, str) else content
        digest.update(f"{name}\0{mode:o}\0{len(raw)}\0{isinstance(content, str)}\0".encode())
        digest.update(raw)
    return digest.hexdigest()


def wheel_files(wheel: Wheel, downloads: Path) -> list[LayerFile]:
    """Fetch a wheel with pip and return the files that the recipe wants of it.

    Raises:
        BuildFailed: pip cannot get it, or it lacks a file.
    """
    folder = Path(tempfile.mkdtemp(dir=downloads))
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    done = subprocess.run(
        [*command, wheel.requirement], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise BuildFailed(f"pip cannot download {wheel.requirement}: {last}", hint="is the package index reachable?")
    found: list[LayerFile] = []
    with zipfile.ZipFile(wheels[0]) as archive:
        for source, target in wheel.files.items():
            matches = list(_in_wheel(archive, source, target))
            if not matches:
                raise BuildFailed(f"{wheels[0].name} has no {source}")
            found += matches
    return [*found, *((name, to, 0o777) for name, to in wheel.links.items())]


def _in_wheel(archive: zipfile.ZipFile, source: str, target: str) -> Iterator[LayerFile]:
    for info in archive.infolist():
        is_meant = info.filename == source or (source.endswith("/") and info.filename.startswith(source))
        if is_meant and not info.is_dir():
            content = archive.read(info)
            is_program = content.startswith((b"#!", b"\x7fELF"))
            yield target + info.filename.removeprefix(source), content, 0o755 if is_program else 0o644
