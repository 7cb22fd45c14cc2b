from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from buildpack import start


@pytest.fixture
def app(tmp_path: Path) -> Path:
    app = tmp_path / "my app"
    (app / ".profile.d").mkdir(parents=True)
    (app / ".profile.d" / "a.sh").write_text('export FROM_PROFILE="1"\nset -- changed\ncd /\n')
    start.install(app, {"web": 'echo "web $PORT $FROM_PROFILE $PWD" && exit 3', "worker": "exec echo $0"})
    return app


def _run(app: Path, *arguments: str, shell: str = "/bin/sh") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shell, str(app / ".hostd" / "start"), *arguments],
        env={"PATH": "/usr/bin:/bin", "PORT": "55001"},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_a_process_type_runs_in_the_app_with_its_profile(app: Path, shell: str) -> None:
    done = _run(app, "web", shell=shell)
    assert done.stdout == f"web 55001 1 {app}\n"
    assert done.returncode == 3
    assert done.stderr == ""


def test_any_command_runs_with_its_arguments_untouched(app: Path) -> None:
    done = _run(app, "--", "printf", "%s|", "a b", "$PORT", "")
    assert done.stdout == "a b|$PORT||"


def test_home_is_the_app(app: Path) -> None:
    assert _run(app, "--", "sh", "-c", "echo $HOME").stdout == f"{app}\n"


@pytest.mark.parametrize("arguments", [["nosuch"], [], ["web", "more"], ["../start"]])
def test_an_unknown_process_type_is_named_beside_those_that_are(app: Path, arguments: list[str]) -> None:
    done = _run(app, *arguments)
    assert done.returncode == 127
    if arguments == ["nosuch"]:
        assert "no process type 'nosuch'; it has: web worker" in done.stderr


def test_a_missing_command_says_so(app: Path) -> None:
    assert _run(app, "--").returncode == 64
    assert _run(app, "--", "nosuch-command").returncode == 127
