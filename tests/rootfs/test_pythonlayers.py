"""What goes into the layers of code and dependencies."""

import marshal
from pathlib import Path

import pytest

from rootfs import pythonlayers
from rootfs.errors import BuildFailed
from rootfs.recipes import Wheel

REPOSITORY = Path(pythonlayers.__file__).resolve().parent.parent


def test_code_is_our_packages_without_byte_code() -> None:
    names = {name for name, _, _ in pythonlayers.code_files(REPOSITORY)}
    assert "opt/hostd/code/rootfs/pythonlayers.py" in names
    assert "opt/hostd/code/rootfs/recipes/base.toml" in names
    assert not any("__pycache__" in name or "/tests/" in name for name in names)


def test_folder_without_our_packages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="buildpack"):
        pythonlayers.code_files(tmp_path)


def test_deps_are_all_that_we_require_and_not_what_tests_do() -> None:
    names = {distribution.name.lower() for distribution in pythonlayers.deps()}
    assert {"aiohttp", "yarl", "cryptography", "cffi", "msgspec"} <= names
    assert not names & {"pytest", "mypy", "hostd"}


def test_deps_have_their_binaries_but_no_scripts() -> None:
    files = pythonlayers.deps_files(each for each in pythonlayers.deps() if each.name == "msgspec")
    assert any(name.endswith(".so") for name, _, _ in files)
    assert all(name.startswith("opt/hostd/deps/") and ".." not in name for name, _, _ in files)


def test_byte_code_is_unchecked_says_where_it_will_lie_and_repeats() -> None:
    source = b"def f() -> set[str]:\n    return {'a', 'b', 'c'} & {'x'}\n"
    files: list[pythonlayers.LayerFile] = [("opt/x/m.py", source, 0o644), ("opt/x/bad.py", b"def (", 0o644)]
    first, again = pythonlayers.compiled(files), pythonlayers.compiled(files)
    assert first == again
    ((name, content, _),) = [each for each in first if each[0].endswith(".pyc")]
    assert name.startswith("opt/x/__pycache__/m.")
    assert isinstance(content, bytes)
    assert content[4:8] == b"\x01\x00\x00\x00"
    assert marshal.loads(content[16:]).co_filename == "/opt/x/m.py"


def test_hash_sees_names_contents_and_modes() -> None:
    base: list[pythonlayers.LayerFile] = [("a", b"1", 0o644), ("b", b"2", 0o644)]
    hashes = {
        pythonlayers.hash_of(base),
        pythonlayers.hash_of([("a", b"1", 0o755), base[1]]),
        pythonlayers.hash_of([("a", b"12", 0o644), ("b", b"", 0o644)]),
        pythonlayers.hash_of([("a", "1", 0o644), base[1]]),
    }
    assert len(hashes) == 4
    assert pythonlayers.hash_of(reversed(base)) == pythonlayers.hash_of(base)


def test_wheel_that_does_not_exist_is_told(tmp_path: Path) -> None:
    wheel = Wheel(requirement=f"{tmp_path}/nosuch-1-py3-none-any.whl", files={})
    with pytest.raises(BuildFailed, match="nosuch"):
        pythonlayers.wheel_files(wheel, tmp_path)
