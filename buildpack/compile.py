"""Runs inside the build job: source in, slug out.

Fetches the source, finds the buildpack, runs it, reads the Procfile, packs the slug, sends it and a
description of it to the blob store. Knows nothing of the cluster but two or three tickets. Refuses
whatever cannot be built, in words for the pusher, with exit status 1. Started by `build` as
`python3 -P -m buildpack.compile` with its task in the environment; standard library only.

Environment: `APP_NAME`, `SOURCE_URL`, `SLUG_URL`, `RESULT_URL`, `APP_ENV` (JSON, the app's own environment),
`SOURCE_VERSION` (the commit), `BUILD_DIR` (/app), `CACHE_DIR` (/cache), `WORK_DIR` (/tmp).
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from buildpack import detect, output, procfile, slug, start, transfer
from buildpack.refusals import BuildRefused

CACHE_BYTES_MAX = 2 * 1024**3
SLUG_BYTES_MAX = 1024**3
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_PASSED_ON = ("PATH", "LANG", "TZ")
_PROXY = re.compile(r"(?:https?|no|all|ftp)_proxy", re.IGNORECASE)
_NOT_FOR_BUILDPACKS = re.compile(r"PATH|HOME|SHELL|IFS|GIT_DIR|CPATH|CPPATH|(?:LD|PYTHON|BASH|DYLD)_?.*")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Task:
    """What to build and where to; the app's environment is the app's, not the builder's."""

    app_name: str
    source_url: str
    slug_url: str
    result_url: str
    version: str
    app_environment: Mapping[str, str]
    build: Path
    cache: Path
    work: Path

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Task:
        """Read the task from the job's environment. A missing entry is a mistake of ours: `KeyError`."""
        return cls(
            app_name=environment["APP_NAME"],
            source_url=environment["SOURCE_URL"],
            slug_url=environment["SLUG_URL"],
            result_url=environment["RESULT_URL"],
            version=environment.get("SOURCE_VERSION", ""),
            app_environment=json.loads(environment.get("APP_ENV", "{}")),
            build=Path(environment.get("BUILD_DIR", "/app")),
            cache=Path(environment.get("CACHE_DIR", "/cache")),
            work=Path(tempfile.mkdtemp(prefix="build-", dir=environment.get("WORK_DIR", "/tmp"))),
        )


def tool_environment(task: Task, outer: Mapping[str, str]) -> dict[str, str]:
    """Return what programs of the build see: a few names of ours, the host's proxies, and its CA bundle."""
    kept = {name: value for name, value in outer.items() if name in _PASSED_ON or _PROXY.fullmatch(name)}
    kept |= {
        "HOME": str(task.work / "home"),  # what tools leave at home stays out of the slug
        "LANG": outer.get("LANG", "C.UTF-8"),
        "APP_DIR": str(task.build),
        "STACK": outer.get("STACK", "debian-12"),
        "SOURCE_VERSION": task.version,
        "REQUEST_ID": task.version,
        "TMPDIR": str(task.work),
    }
    if CA_BUNDLE.exists():
        names = ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
        kept |= dict.fromkeys((*names, "PIP_CERT", "npm_config_cafile"), str(CA_BUNDLE))
    return kept


def build(task: Task, outer: Mapping[str, str]) -> None:
    """Carry the task out, from source to stored slug.

    Raises:
        BuildRefused: the source cannot be built.
        OSError: the builder's disk is full.
    """
    environment = tool_environment(task, outer)
    Path(environment["HOME"]).mkdir(exist_ok=True)
    unpack_source(task)
    detected = detect.choose(task.build, task.work, task.app_environment.get("BUILDPACK_URL", ""), environment)
    output.step(f"{detected.shown} app detected")
    declared = read_procfile(task.build)  # before the long part: a wrong Procfile is told at once
    compile_with(detected.pack, task, environment)
    processes = process_types(detected, declared, task, environment)
    start.install(task.build, processes)
    packed = slug.pack(task.build, task.work / "slug.tar.zst")
    if packed.size_bytes > SLUG_BYTES_MAX:
        raise BuildRefused(
            f"the slug is {slug.human_size(packed.size_bytes)}, at most {slug.human_size(SLUG_BYTES_MAX)} are allowed",
            "name what the running app does not need in .slugignore",
        )
    output.step(f"Compiled slug size is {slug.human_size(packed.size_bytes)}")
    send(task, packed, detected.shown, processes)
    bound_cache(task.cache)


def unpack_source(task: Task) -> None:
    """Fetch the source into the build folder and leave out what `.slugignore` names."""
    task.build.mkdir(parents=True, exist_ok=True)
    task.cache.mkdir(parents=True, exist_ok=True)
    with transfer.fetch(task.source_url, "the source") as source:
        command = ["tar", "-x", "-C", str(task.build), "--no-same-owner", "-f", "-"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as tar:
            assert tar.stdin is not None
            assert tar.stderr is not None
            try:
                shutil.copyfileobj(source, tar.stdin, transfer.CHUNK_BYTES)
                tar.stdin.close()
            except BrokenPipeError:
                pass  # tar says why
            complaint = tar.stderr.read().decode("utf-8", "replace").strip()
    if tar.returncode != 0:
        if "No space left" in complaint or "Wrote only" in complaint:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise BuildRefused(f"the source cannot be unpacked: {complaint[-300:]}")
    if os.path.lexists(task.build / ".hostd"):
        raise BuildRefused("the repository has .hostd, a name that the platform uses in slugs", "call it otherwise")
    if (task.build / ".gitmodules").exists():
        output.warn("Git submodules are not fetched: their folders are empty")
    _drop_ignored(task.build)


def _drop_ignored(app: Path) -> None:
    file = app / ".slugignore"
    if not file.is_file():
        return
    for pattern in file.read_text("utf-8", "replace").splitlines():
        wanted = pattern.strip().strip("/")
        if not wanted or wanted.startswith("#") or ".." in wanted.split("/"):
            continue
        for path in list(app.glob(wanted if pattern.strip().startswith("/") else f"**/{wanted}")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def read_procfile(app: Path) -> dict[str, str]:
    """Return the Procfile's types, none if there is no Procfile."""
    file = app / "Procfile"
    try:
        return procfile.parse(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BuildRefused(f"Procfile cannot be read: {error.strerror}", "it must be a text file") from error


def compile_with(pack: detect.Pack, task: Task, environment: Mapping[str, str]) -> None:
    """Run the buildpack's `bin/compile`."""
    folder = task.work / "env"
    write_env_dir(folder, task.app_environment)
    cache = task.cache / pack.name
    cache.mkdir(parents=True, exist_ok=True)
    status = output.follow(
        pack.command("compile", task.build, cache, folder),
        cwd=task.build,
        environment=pack.environment(environment),
        prefix="",
    )
    if status != 0:
        raise BuildRefused("the buildpack could not compile the app", "its words are above")


def write_env_dir(folder: Path, environment: Mapping[str, str]) -> None:
    """Write the app's environment as one file a variable; what would bend the build's own tools stays out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in environment.items():
        if _ENV_NAME.fullmatch(name) and not _NOT_FOR_BUILDPACKS.fullmatch(name):
            (folder / name).write_text(value, encoding="utf-8")


def process_types(
    detected: detect.Detected, declared: Mapping[str, str], task: Task, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return all process types: the Procfile's, then the buildpack's defaults that it does not redefine."""
    output.step("Discovering process types")
    if declared:
        output.detail(f"Procfile declares types -> {', '.join(declared)}")
    defaults = release_defaults(detected.pack, task.build, environment)
    added = {name: command for name, command in defaults.items() if name not in declared}
    if added:
        output.detail(f"Default types for {detected.shown} -> {', '.join(added)}")
    if not declared and not added:
        output.warn("No process types: add a Procfile with a line such as `web: COMMAND`")
    return {**declared, **added}


def release_defaults(pack: detect.Pack, app: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Ask `bin/release` for the default process types; a buildpack without one has none."""
    if pack.folder is None:
        return dict(pack.module().release(app))
    if not pack.has("release"):
        return {}
    answer = subprocess.run(
        pack.command("release", app),
        cwd=app,
        env=pack.environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if answer.returncode != 0:
        raise BuildRefused(
            f"the buildpack's bin/release failed (exit status {answer.returncode})",
            answer.stderr.decode("utf-8", "replace").strip()[-300:],
        )
    lines = default_types(answer.stdout.decode("utf-8", "replace"))
    return procfile.parse("\n".join(f"{name}: {command}" for name, command in lines.items()).encode())


def default_types(text: str) -> dict[str, str]:
    """Read `default_process_types` from the little YAML that `bin/release` prints: a mapping of plain or quoted text.

    The standard library has no YAML; buildpacks print this one shape (Heroku's buildpack API).
    """
    types: dict[str, str] = {}
    is_inside = False
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#") or line.strip() == "---":
            continue
        if not line[0].isspace():
            is_inside = line.split(":")[0].strip() == "default_process_types"
            continue
        name, colon, value = line.strip().partition(":")
        if is_inside and colon:
            types[_unquote(name)] = _unquote(value)
    return types


def _unquote(text: str) -> str:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    return text


def send(task: Task, packed: slug.Slug, shown: str, processes: Mapping[str, str]) -> None:
    """Store the slug, then the description that `build` waits for."""
    with packed.path.open("rb") as file:
        transfer.store(task.slug_url, "the slug", file, packed.size_bytes)
    result = {
        "buildpack": shown,
        "processes": dict(processes),
        "digest": packed.digest,
        "size_bytes": packed.size_bytes,
        "media_type": slug.MEDIA_TYPE,
    }
    raw = json.dumps(result).encode()
    transfer.store(task.result_url, "the build's result", io.BytesIO(raw), len(raw))


def bound_cache(cache: Path) -> None:
    """Empty a cache that has grown too large, because nobody else would."""
    total = sum(path.lstat().st_blocks * 512 for path in cache.rglob("*"))
    if total > CACHE_BYTES_MAX:
        output.detail(f"The build cache has grown to {slug.human_size(total)}: emptied")
        for path in cache.iterdir():
            shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """Build; return the exit status."""
    try:
        task = Task.read(os.environ)
        build(task, os.environ)
    except BuildRefused as error:
        output.refuse(error)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        output.refuse(BuildRefused("the builder's disk is full", "free space on the host, then push again"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
