from __future__ import annotations

import os
from pathlib import Path

import pytest

from buildpack import compile
from buildpack.refusals import BuildRefused


def _task(folder: Path, **environment: str) -> compile.Task:
    urls = dict.fromkeys(("SOURCE_URL", "SLUG_URL", "RESULT_URL"), "http://127.0.0.1:1/x")
    folders = {"BUILD_DIR": str(folder / "app"), "CACHE_DIR": str(folder / "cache"), "WORK_DIR": str(folder)}
    return compile.Task.read({"APP_NAME": "x", **urls, **folders, **environment})


def test_tools_see_proxies_and_the_ca_bundle_but_nothing_else_of_the_builder(tmp_path: Path) -> None:
    outer = {"PATH": "/bin", "https_proxy": "http://p", "NO_PROXY": "x", "SLUG_URL": "secret", "PYTHONPATH": "/ours"}
    seen = compile.tool_environment(_task(tmp_path), outer)
    assert seen["https_proxy"] == "http://p"
    assert seen["NO_PROXY"] == "x"
    assert seen["HOME"] != str(tmp_path / "app")
    assert "PYTHONPATH" not in seen
    assert "secret" not in seen.values()
    assert ("PIP_CERT" in seen) == compile.CA_BUNDLE.exists()


def test_the_apps_environment_becomes_files_without_what_bends_tools(tmp_path: Path) -> None:
    names = ["A", "DATABASE_URL", "PATH", "LD_PRELOAD", "PYTHONPATH", "GIT_DIR", "HOME", "../x", "a b", "BASH_ENV"]
    compile.write_env_dir(tmp_path / "env", dict.fromkeys(names, "line\nline"))
    assert sorted(os.listdir(tmp_path / "env")) == ["A", "DATABASE_URL"]
    assert (tmp_path / "env" / "A").read_text() == "line\nline"


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("", {}),
        (
            "---\naddons: []\ndefault_process_types:\n  web: bin/run -x 1\n  w: 'it''s'\n",
            {"web": "bin/run -x 1", "w": "it's"},
        ),
        ('default_process_types:\n    web: "say \\"hi\\""\nconfig_vars:\n    web: no\n', {"web": 'say "hi"'}),
        ("default_process_types: {}\n", {}),
        ("# c\ndefault_process_types:\n  # c\n\n  a: b: c\n", {"a": "b: c"}),
    ],
)
def test_default_types_are_read_as_buildpacks_print_them(text: str, types: dict[str, str]) -> None:
    assert compile.default_types(text) == types


def test_a_procfile_that_is_no_file_is_refused_and_none_is_fine(tmp_path: Path) -> None:
    assert compile.read_procfile(tmp_path) == {}
    (tmp_path / "Procfile").mkdir()
    with pytest.raises(BuildRefused, match="cannot be read"):
        compile.read_procfile(tmp_path)


def test_a_cache_that_grew_too_large_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "npm").mkdir()
    (tmp_path / "npm" / "x").write_bytes(b"x" * 100_000)
    compile.bound_cache(tmp_path)
    assert (tmp_path / "npm" / "x").exists()
    monkeypatch.setattr(compile, "CACHE_BYTES_MAX", 10_000)
    compile.bound_cache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_slugignore_leaves_files_out_and_nothing_outside(tmp_path: Path) -> None:
    app = tmp_path / "app"
    for name in ("docs/a.md", "src/docs/b.md", "keep.py", "notes.psd", "tests/x"):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).touch()
    (tmp_path / "outside").touch()
    (app / ".slugignore").write_text("# c\n/docs\n*.psd\ntests\n../outside\n")
    compile._drop_ignored(app)
    left = sorted(str(path.relative_to(app)) for path in app.rglob("*") if path.is_file())
    assert left == [".slugignore", "keep.py", "src/docs/b.md"]
    assert (tmp_path / "outside").exists()


def test_a_blob_store_that_is_away_is_said(tmp_path: Path) -> None:
    with pytest.raises(BuildRefused, match="the blob store cannot be reached"):
        compile.unpack_source(_task(tmp_path))
