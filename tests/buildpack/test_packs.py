from __future__ import annotations

import json
from pathlib import Path

import pytest

from buildpack import detect
from buildpack.packs import nodejs, python, static
from buildpack.refusals import BuildRefused


@pytest.mark.parametrize(
    ("version", "wanted", "does"),
    [
        ("3.11.2", "3", True),
        ("3.11.2", "3.11", True),
        ("3.11.2", "3.1", False),
        ("3.11.2", "3.11.2", True),
        ("3.11.2", "3.11.3", False),
        ("3.11.2", ">=3.10,<4", True),
        ("3.11.2", ">=3.12", False),
        ("3.11.0", ">3.11", False),
        ("3.11.2", "~=3.10", True),
        ("3.11.2", "~=3.11.0", True),
        ("3.12.0", "~=3.11.0", False),
        ("3.11.2", "==3.11.*", True),
        ("3.11.2", "!=3.11.*", False),
        ("3.11.2", "==3.11", False),
        ("3.11.2", "<=3.11.2, !=3.11.1", True),
        ("3.11.2", "nonsense", False),
    ],
)
def test_python_versions_fit_as_packaging_says(version: str, wanted: str, does: bool) -> None:
    assert python.satisfies(version, wanted) is does


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        (".python-version", "# pyenv\n3.12\n", "3.12"),
        (".python-version", "cpython-3.12.1", "3.12.1"),
        ("runtime.txt", "python-3.11.4\n", "3.11.4"),
        ("pyproject.toml", '[project]\nname = "x"\nrequires-python = ">=3.12"\n', ">=3.12"),
        ("pyproject.toml", "[tool.x]\n", ""),
    ],
)
def test_a_python_version_is_found_where_people_write_it(tmp_path: Path, name: str, text: str, wanted: str) -> None:
    (tmp_path / name).write_text(text)
    assert python.wanted_version(tmp_path) == (wanted, name if wanted else "")


@pytest.mark.parametrize("text", ["", "pypy-3.9", "latest", "2.7.18"])
def test_a_python_version_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / ".python-version").write_text(text)
    with pytest.raises(BuildRefused, match=r"\.python-version"):
        python.wanted_version(tmp_path)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"package.json": '{"engines": {"node": " 20.x "}}', ".nvmrc": "18"}, "20.x"),
        ({"package.json": "{}", ".nvmrc": "v18.1.0\n"}, "18.1.0"),
        ({"package.json": "{}", ".nvmrc": "# c\n\n20"}, "20"),
        ({"package.json": "{}", ".node-version": "21"}, "21"),
        ({"package.json": "{}", ".nvmrc": "lts/*"}, ""),
        ({"package.json": '{"engines": "18"}'}, ""),
        ({"package.json": "{}"}, ""),
    ],
)
def test_a_node_range_is_found_where_people_write_it(tmp_path: Path, files: dict[str, str], wanted: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert nodejs.wanted_range(tmp_path, nodejs.read_package(tmp_path)) == wanted


def test_node_starts_by_its_start_script_or_server_js(tmp_path: Path) -> None:
    package = tmp_path / "package.json"
    package.write_text("{}")
    assert nodejs.release(tmp_path) == {}
    (tmp_path / "server.js").touch()
    assert nodejs.release(tmp_path) == {"web": "node server.js"}
    package.write_text(json.dumps({"scripts": {"start": "x"}}))
    assert nodejs.release(tmp_path) == {"web": "npm start"}


def test_two_lock_files_are_refused(tmp_path: Path) -> None:
    for name in ("package-lock.json", "yarn.lock"):
        (tmp_path / name).touch()
    with pytest.raises(BuildRefused, match=r"more than one lock file: package-lock\.json, yarn\.lock"):
        nodejs._check_one_lock(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "", "\xff"])
def test_a_package_json_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "package.json").write_text(text, encoding="latin-1")
    with pytest.raises(BuildRefused, match=r"package\.json does not parse"):
        nodejs.read_package(tmp_path)


def test_a_static_site_is_found_in_the_usual_folders(tmp_path: Path) -> None:
    assert static.detect(tmp_path) is None
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "index.html").touch()
    assert static.detect(tmp_path) == "Static"
    assert static._root(tmp_path, "") == tmp_path / "public"


@pytest.mark.parametrize("text", ["root public", "nosuch: x", "root: x\n!!"])
def test_a_staticfile_line_that_is_no_setting_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "Staticfile").write_text(text)
    with pytest.raises(BuildRefused, match=r"Staticfile line \d"):
        static.read_staticfile(tmp_path)


@pytest.mark.parametrize("root", ["../..", "/etc", "nosuch", "a;b"])
def test_a_static_root_stays_in_the_repository(tmp_path: Path, root: str) -> None:
    (tmp_path / "a;b").mkdir()
    with pytest.raises(BuildRefused, match="no folder of this repository"):
        static._root(tmp_path, root)


def _choose(app: Path, work: Path, url: str = "") -> detect.Detected:
    return detect.choose(app, work, url, {"PATH": "/usr/bin:/bin"})


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("package.json", "Node.js"),
        ("requirements.txt", "Python"),
        ("pyproject.toml", "Python"),
        ("index.html", "Static"),
    ],
)
def test_the_buildpack_is_chosen_by_what_lies_in_the_root(tmp_path: Path, work: Path, name: str, shown: str) -> None:
    (tmp_path / name).touch()
    assert _choose(tmp_path, work).shown == shown


def test_an_app_that_nobody_takes_is_refused_with_what_is_understood(tmp_path: Path, work: Path) -> None:
    with pytest.raises(BuildRefused, match="no buildpack takes this app") as caught:
        _choose(tmp_path, work)
    assert "requirements.txt" in caught.value.hint


@pytest.mark.parametrize("url", ["../..", "/etc", "nosuch", "./empty"])
def test_a_buildpack_that_is_none_is_refused(tmp_path: Path, work: Path, url: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BuildRefused, match="BUILDPACK_URL"):
        _choose(tmp_path, work, url)


def test_a_buildpack_that_does_not_take_the_app_is_refused(tmp_path: Path, work: Path) -> None:
    for verb in ("detect", "compile"):
        path = tmp_path / "pack" / "bin" / verb
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    with pytest.raises(BuildRefused, match="does not take this app"):
        _choose(tmp_path, work, "pack")


def test_credentials_of_a_buildpacks_url_are_not_shown(tmp_path: Path, work: Path) -> None:
    with pytest.raises(BuildRefused) as caught:
        _choose(tmp_path, work, "http://user:secret@127.0.0.1:1/x.git#v1")
    assert "secret" not in caught.value.message + caught.value.hint
    assert "http://127.0.0.1:1/x.git" in caught.value.message
