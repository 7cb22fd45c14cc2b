"""Builds a Node.js app: its Node version, its dependencies, its build script.

The version comes from `engines.node`, `.nvmrc` or `.node-version`; the stack's own Node is taken when it
fits, otherwise npm's packaged builds of Node. Dependencies come from the lock file that is there
(npm, yarn, pnpm). Refuses a version that cannot be had, naming those that can. Standard library,
`node` and `npm` only.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from buildpack import output
from buildpack.packs import contract
from buildpack.refusals import BuildRefused

YARN, PNPM = "yarn@1.22.22", "pnpm@10"
_OLDEST_NODE_FOR_NPM = 18
_PROFILE = """\
export PATH="$HOME/.hostd/node/bin:$HOME/node_modules/.bin:$PATH"
export NODE_ENV="${NODE_ENV:-production}"
"""
_KEPT_FROM_APP = ("NODE_ENV", "NODE_OPTIONS", "NPM_CONFIG_", "npm_config_", "YARN_")


def detect(app: Path) -> str | None:
    """Take an app with a package.json."""
    return "Node.js" if (app / "package.json").is_file() else None


def compile(shop: contract.Workshop) -> None:
    """Install Node and the dependencies, and run the app's build script."""
    package = read_package(shop.app)
    node = provide_node(shop, wanted_range(shop.app, package))
    environment = _environment(shop, node)
    install_dependencies(shop, package, environment)
    output.step("Building runtime environment")
    shop.write_profile("nodejs", _PROFILE)


def release(app: Path) -> Mapping[str, str]:
    """Start what package.json or a server.js says."""
    package = read_package(app)
    if "start" in _scripts(package):
        return {"web": "npm start"}
    return {"web": "node server.js"} if (app / "server.js").is_file() else {}


def read_package(app: Path) -> dict[str, Any]:
    """Return package.json.

    Raises:
        BuildRefused: it is no JSON object.
    """
    try:
        package = json.loads((app / "package.json").read_text("utf-8-sig"))
    except (ValueError, OSError) as error:
        raise BuildRefused(f"package.json does not parse: {error}") from error
    if not isinstance(package, dict):
        raise BuildRefused("package.json does not parse: it is no JSON object")
    return package


def _section(package: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = package.get(name)
    return section if isinstance(section, dict) else {}


def _scripts(package: Mapping[str, Any]) -> dict[str, Any]:
    return _section(package, "scripts")


def wanted_range(app: Path, package: Mapping[str, Any]) -> str:
    """Return the Node range that the app asks for, empty if it does not care."""
    engine = _section(package, "engines").get("node")
    if isinstance(engine, str) and engine.strip():
        return engine.strip()
    for name in (".nvmrc", ".node-version"):
        file = app / name
        if file.is_file():
            lines = [line.split("#")[0].strip() for line in file.read_text("utf-8", "replace").splitlines()]
            wanted = next((line for line in lines if line), "")
            return "" if wanted in ("node", "stable", "lts/*", "*") else wanted.removeprefix("v")
    return ""


def provide_node(shop: contract.Workshop, wanted: str) -> Path:
    """Return the folder with the `node` to use: the stack's, or one put into the app.

    Raises:
        BuildRefused: no version that fits can be had.
    """
    own, own_version = _stack_node(shop)
    output.step(f"Requested node range: {wanted}" if wanted else "No node version requested: using the stack's")
    if not wanted or pick_version([own_version], wanted, shop):
        output.step(f"Resolved node version: {own_version}")
        return own.parent
    available = _published_versions(shop)
    version = pick_version(available, wanted, shop)
    if not version:
        raise _no_such_version(wanted, own_version, available)
    output.step(f"Resolved node version: {version}")
    return _install_node(shop, version)


def _stack_node(shop: contract.Workshop) -> tuple[Path, str]:
    found = shutil.which("node", path=shop.environment.get("PATH"))
    if found is None:
        raise BuildRefused("the stack has no Node.js: the builder's image is broken")
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    return Path(found), answer.stdout.strip().removeprefix("v")


def _npm_script(shop: contract.Workshop) -> Path:
    found = shutil.which("npm", path=shop.environment.get("PATH"))
    if found is None:
        raise BuildRefused("the stack has no npm: the builder's image is broken")
    return Path(found).resolve()


def pick_version(versions: Sequence[str], wanted: str, shop: contract.Workshop) -> str:
    """Return the highest version in the range, empty if none; asks npm's own semver, the one that defines ranges.

    Raises:
        BuildRefused: the range is no range.
    """
    semver = _npm_script(shop).parent.parent / "node_modules" / "semver"
    script = (
        "const s=require(process.argv[1]);const i=JSON.parse(require('fs').readFileSync(0,'utf8'));"
        "if(s.validRange(i.wanted)===null){process.exit(3)}"
        "console.log(s.maxSatisfying(i.versions,i.wanted)||'')"
    )
    answer = subprocess.run(
        [str(_stack_node(shop)[0]), "-e", script, str(semver)],
        input=json.dumps({"wanted": wanted, "versions": list(versions)}),
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode == 3:
        raise BuildRefused(f"the node version {wanted!r} is no version range", "for example 22.x or >=20")
    if answer.returncode != 0:
        raise BuildRefused(f"node versions cannot be compared: {answer.stderr.strip()[-300:]}")
    return answer.stdout.strip()


def _node_package() -> str:
    names = {"x86_64": "x64", "aarch64": "arm64", "armv7l": "armv7l", "ppc64le": "ppc64le", "s390x": "s390x"}
    return f"node-linux-{names.get(platform.machine(), platform.machine())}"


def _published_versions(shop: contract.Workshop) -> list[str]:
    """Return the versions of Node that npm's registry has, none if it cannot be reached."""
    answer = subprocess.run(
        [*_npm(shop), "view", _node_package(), "versions", "--json"],
        cwd=shop.cache,
        env=_environment(shop, None),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    try:
        versions = json.loads(answer.stdout) if answer.returncode == 0 else []
    except ValueError:
        versions = []
    return [version for version in versions if isinstance(version, str)] if isinstance(versions, list) else []


def _no_such_version(wanted: str, own_version: str, available: Sequence[str]) -> BuildRefused:
    newest = {version.split(".")[0]: version for version in available if "-" not in version}
    others = f", or from npm {', '.join(newest.values())} and those between" if newest else ""
    reached = "" if newest else " (the npm registry, which has others, cannot be reached)"
    return BuildRefused(
        f"no Node.js version satisfies {wanted!r}", f"there is {own_version} (the stack's own){others}{reached}"
    )


def _install_node(shop: contract.Workshop, version: str) -> Path:
    kept = shop.cache / "node" / version
    if not (kept / "bin" / "node").is_file():
        output.step("Downloading and installing node")
        shutil.rmtree(shop.cache / "node", ignore_errors=True)
        fresh = shop.cache / "node-new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        output.run(
            [*_npm(shop), "install", "--no-save", "--prefix", str(fresh), f"{_node_package()}@{version}"],
            cwd=fresh,
            environment=_environment(shop, None),
            otherwise=f"node {version} cannot be installed",
            silent=True,
        )
        package = fresh / "node_modules" / _node_package()
        (kept / "bin").mkdir(parents=True)
        if (package / "include").is_dir():
            shutil.copytree(package / "include", kept / "include")
        shutil.copy2(package / "bin" / "node", kept / "bin" / "node.new")
        (kept / "bin" / "node.new").rename(kept / "bin" / "node")
        shutil.rmtree(fresh)
    else:
        output.step(f"Using node {version} from the build cache")
    target = shop.app / ".hostd" / "node" / "bin"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy2(kept / "bin" / "node", target / "node")
    if _is_old(version):
        _write_npm(shop, target)
    return target


def _is_old(version: str) -> bool:
    """Return whether a Node is too old for the stack's npm."""
    major = version.split(".")[0]
    return not major.isdecimal() or int(major) < _OLDEST_NODE_FOR_NPM


def _write_npm(shop: contract.Workshop, folder: Path) -> None:
    """Let the stack's npm run by the stack's Node beside an old one; the scripts that it starts use the old one."""
    own = _stack_node(shop)[0]
    for name in ("npm", "npx"):
        script = _npm_script(shop).with_name(f"{name}-cli.js")
        (folder / name).write_text(f'#!/bin/sh\nexec "{own}" "{script}" "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)


def _npm(shop: contract.Workshop, node: Path | None = None) -> list[str]:
    """Return how to call npm: by the app's Node, unless that is too old for the stack's npm."""
    runner = str(_stack_node(shop)[0])
    if node is not None:
        answer = subprocess.run([node / "node", "--version"], capture_output=True, text=True, check=False)
        if not _is_old(answer.stdout.strip().removeprefix("v")):
            runner = str(node / "node")
    return [runner, str(_npm_script(shop))]


def _environment(shop: contract.Workshop, node: Path | None) -> dict[str, str]:
    taken = {name: value for name, value in shop.app_environment.items() if name != "PORT"}
    path = [str(node), str(shop.app / "node_modules" / ".bin")] if node is not None else []
    return {
        "NODE_ENV": "production",
        **(taken if node is not None else {k: v for k, v in taken.items() if k.startswith(_KEPT_FROM_APP)}),
        **shop.environment,
        "PATH": os.pathsep.join([*path, shop.environment.get("PATH", "/usr/local/bin:/usr/bin:/bin")]),
        "npm_config_cache": str(shop.cache / "npm"),
        "npm_config_fund": "false",
        "npm_config_audit": "false",
        "npm_config_update_notifier": "false",
        "npm_config_progress": "false",
        "YARN_CACHE_FOLDER": str(shop.cache / "yarn"),
        "CI": "true",
        **_headers(shop, node),
    }


def _headers(shop: contract.Workshop, node: Path | None) -> dict[str, str]:
    """Point node-gyp to the headers of the Node in use, where they came with it: no download then."""
    own = node.parent if node is not None else _stack_node(shop)[0].parent.parent
    kept = sorted((shop.cache / "node").glob("*"))  # one version at most; its headers stay out of the slug
    found = next((prefix for prefix in (own, *kept) if (prefix / "include" / "node").is_dir()), None)
    return {"npm_config_nodedir": str(found)} if found is not None else {}


def install_dependencies(shop: contract.Workshop, package: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Install by the lock file that is there, run the build script if there is one, then drop what only it needed."""
    script = next((name for name in ("heroku-postbuild", "build") if name in _scripts(package)), "")
    if not script and not any(
        _section(package, name) for name in ("dependencies", "optionalDependencies", "workspaces")
    ):
        output.step("No dependencies to install")
        return
    node = Path(environment["PATH"].split(os.pathsep)[0])
    npm = _npm(shop, node)
    output.step("Installing dependencies")
    _check_one_lock(shop.app)
    is_npm = not (shop.app / "yarn.lock").exists() and not (shop.app / "pnpm-lock.yaml").exists()
    output.run(
        _install_command(shop, npm, is_for_build=bool(script)),
        cwd=shop.app,
        environment=environment,
        otherwise="the dependencies cannot be installed",
        hint="the package manager's words are above; does the lock file fit package.json?",
    )
    if script:
        output.step(f"Running the {script} script")
        output.run(
            [*npm, "run", script], cwd=shop.app, environment=environment, otherwise=f"the {script} script failed"
        )
        if is_npm:
            output.step("Removing development dependencies")
            output.run(
                [*npm, "prune", "--omit=dev"],
                cwd=shop.app,
                environment=environment,
                otherwise="npm prune failed",
                silent=True,
            )


def _install_command(shop: contract.Workshop, npm: Sequence[str], *, is_for_build: bool) -> list[str]:
    fetched = [*npm, "exec", "--yes", "--"]
    dev = "--include=dev" if is_for_build else "--omit=dev"
    if (shop.app / "yarn.lock").exists():
        keep = "false" if is_for_build else "true"
        return [*fetched, YARN, "install", "--frozen-lockfile", f"--production={keep}"]
    if (shop.app / "pnpm-lock.yaml").exists():
        store = f"--store-dir={shop.cache / 'pnpm'}"
        return [*fetched, PNPM, "install", "--frozen-lockfile", store, *([] if is_for_build else ["--prod"])]
    if (shop.app / "package-lock.json").exists() or (shop.app / "npm-shrinkwrap.json").exists():
        return [*npm, "ci", dev]
    return [*npm, "install", dev, "--no-package-lock"]


def _check_one_lock(app: Path) -> None:
    found = [name for name in ("package-lock.json", "yarn.lock", "pnpm-lock.yaml") if (app / name).exists()]
    if len(found) > 1:
        raise BuildRefused(f"more than one lock file: {', '.join(found)}", "keep the one of the tool you use")


if __name__ == "__main__":
    contract.main(detect, compile, release)
