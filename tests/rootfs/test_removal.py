"""Whole trees go, however somebody built them, and nothing outside of them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rootfs.removal import remove_tree


def nest(folder: Path, depth: int) -> None:
    """Make directories inside each other, deeper than any path may be long."""
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here))
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_a_tree_deeper_than_the_stack_and_the_longest_path_goes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    nest(tree, 5 * sys.getrecursionlimit())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 16, hard))  # beside what this test run has open
    try:
        remove_tree(tree)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    kept, tree = tmp_path / "kept", tmp_path / "tree"
    (kept / "inside").mkdir(parents=True)
    (kept / "inside" / "file").write_text("mine")
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "to-folder").symlink_to(kept)
    (tree / "a" / "b" / "up").symlink_to("../../../kept/inside")
    (tree / "a" / "nowhere").symlink_to("/nonexistent")
    os.mkfifo(tree / "a" / "pipe")
    remove_tree(tree)
    assert not tree.exists()
    assert (kept / "inside" / "file").read_text() == "mine"


def test_the_top_itself_may_be_a_link_a_file_or_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "file").write_text("x")
    for name in ("link", "file", "nothing"):
        remove_tree(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_what_cannot_go_is_told_and_all_else_goes(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "busy").mkdir(parents=True)
    (tree / "a" / "file").write_text("x")
    script = (
        "import sys; from pathlib import Path; from rootfs.removal import remove_tree\n"
        "told = []; tree = Path(sys.argv[1])\n"
        "remove_tree(tree, lambda path, error: told.append(path))\n"
        "print(sorted(told))\n"
        "try: remove_tree(tree)\n"
        "except OSError as error: print(error.errno)\n"
    )
    command = f"mount -t tmpfs none {tree}/a/busy && exec {sys.executable} -c '{script}' {tree}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "busy" in first
    assert second == "16"
    assert not (tree / "a" / "file").exists()
