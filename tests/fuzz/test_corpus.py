"""What fuzzing has found, and where it begins, in every test run."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.fuzz.__main__ import TARGETS, target_of
from tests.fuzz.harness import CORPUS, replay


@pytest.mark.needs_root
@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"spawner"}))
def test_replay(name: str) -> None:
    target = target_of(name)
    target.open()
    try:
        assert replay(name, target) >= 3
    finally:
        target.close()


@pytest.mark.needs_root
def test_replay_to_a_real_spawner() -> None:
    assert shutil.which("unshare")
    command = [sys.executable, "-m", "tests.fuzz", "spawner", "--replay"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_corpus_has_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
