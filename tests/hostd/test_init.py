"""The init of jobs: it ends as its program ends, passes signals on, reaps, and finds a program as a shell would."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hostd.runtime import init

SOURCE = Path(init.__file__).with_suffix(".c")
IS_KNOWN = os.uname().machine in init.IMAGES


def compiler_version() -> str:
    if shutil.which("gcc") is None:
        return ""
    return subprocess.run(["gcc", "-dumpfullversion"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(params=["kept", "compiled"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "compiled" and not (IS_KNOWN and compiler_version()):
        pytest.skip("needs gcc, on a machine that has an init of ours")
    path = tmp_path / "init"
    path.write_bytes(init.program() if request.param == "kept" else init.compiled(SOURCE.read_bytes()))
    path.chmod(0o755)
    return path


def run(program: Path, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, "--", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"]} if env is None else env,
    )


@pytest.mark.skipif(compiler_version() != "12.2.0", reason="needs Debian 12's gcc")
@pytest.mark.skipif(not IS_KNOWN, reason="there is no init of ours for this machine")
def test_what_is_kept_is_what_gcc_makes_of_the_source() -> None:
    assert init.program() == init.compiled(SOURCE.read_bytes())


def test_it_maps_nothing_that_can_be_written(program: Path) -> None:
    done = run(program, "/bin/sh", "-c", "cat /proc/$PPID/maps")
    parts = [line.split() for line in done.stdout.splitlines()]
    assert [part[1] for part in parts if part[-1] == str(program)] in (["r-xp"], [])
    assert not any(part[1].startswith("rwx") for part in parts)


@pytest.mark.parametrize("status", [0, 1, 7, 127, 255])
def test_it_ends_with_the_programs_status(program: Path, status: int) -> None:
    assert run(program, "sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_programs_death_by_a_signal_is_128_and_its_number(program: Path, number: int) -> None:
    assert run(program, "sh", "-c", f"kill -{int(number)} $$").returncode == 128 + number


def test_it_passes_arguments_and_environment_on(program: Path) -> None:
    done = run(program, "sh", "-c", 'echo "$0:$1:$X"', "a b", "", env={"PATH": "/bin", "X": "y z"})
    assert done.stdout == "a b::y z\n"


def test_it_finds_the_first_program_of_the_path_that_may_be_executed(program: Path, tmp_path: Path) -> None:
    for folder, mode, text in (("none", 0o644, "no"), ("first", 0o755, "first"), ("second", 0o755, "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tool").write_text(f"#!/bin/sh\necho {text}\n")
        (tmp_path / folder / "tool").chmod(mode)
    path = ":".join(["/nosuch", "x" * 5000, *(str(tmp_path / each) for each in ("none", "first", "second"))])
    assert run(program, "tool", env={"PATH": path}).stdout == "first\n"


def test_a_script_without_an_interpreter_is_the_shells(program: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0:$1"\n')
    script.chmod(0o755)
    assert run(program, str(script), "one").stdout == f"{script}:one\n"
    assert run(program, "script", "two", env={"PATH": f"/nosuch:{tmp_path}"}).stdout == f"{script}:two\n"


def test_what_cannot_be_executed_is_said(program: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("no program")
    (tmp_path / "broken").write_bytes(b"\x7fELF" + bytes(60))
    (tmp_path / "broken").chmod(0o755)
    missing = run(program, "nosuch")
    assert (missing.returncode, missing.stderr[:15]) == (127, 'exec: "nosuch":')
    denied = run(program, str(tmp_path / "plain"))
    assert (denied.returncode, "permission denied" in denied.stderr) == (126, True)
    assert run(program, str(tmp_path / "broken")).returncode in (126, 127, 2)  # the shell may be asked
    assert run(program, "tool", env={}).returncode == 127


def test_without_a_program_it_ends(program: Path) -> None:
    assert subprocess.run([program], timeout=60, check=False).returncode == 0
    assert subprocess.run([program, "--version"], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGRTMIN + 3])
def test_it_passes_signals_on(program: Path, number: int) -> None:
    code = (
        f"import signal; signal.sigwait([{int(number)}]) if signal.pthread_sigmask(0, [{int(number)}]) is None else 0"
    )
    code = (
        f"import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\nprint('on', flush=True)\n"
        f"raise SystemExit(signal.sigwait([{int(number)}]))"
    )
    with subprocess.Popen([program, "--", sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        process.send_signal(number)
        assert process.wait(60) == number


def test_the_programs_signals_are_as_they_were(program: Path) -> None:
    done = run(program, "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    bare = subprocess.run(
        ["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"], capture_output=True, text=True, check=True
    )
    assert done.stdout == bare.stdout


def test_it_hears_of_the_end_also_if_its_parent_ignored_its_childrens(program: Path) -> None:
    command = ["sh", "-c", "trap '' CHLD; exec \"$0\" -- sh -c 'exit 5'", str(program)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 5


@pytest.mark.needs_root
def test_as_the_first_process_it_reaps_what_others_leave(program: Path) -> None:
    script = (
        'for i in 1 2 3 4 5; do sh -c \'sh -c "exit 3" & sh -c "sleep 0.05" &\'; done; '
        "while grep -qs sleep /proc/[0-9]*/comm; do :; done; "
        "while grep -qs '^State:.Z' /proc/[0-9]*/status; do :; done; exit 9"
    )
    command = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", str(program), "--", "sh", "-c", script]
    assert subprocess.run(command, timeout=120, check=False).returncode == 9


def test_the_program_has_the_terminal(program: Path) -> None:
    code = (
        "import os; print(os.tcgetpgrp(0) == os.getpgrp(), os.getpgrp() == os.getpid(), os.getppid() != os.getsid(0))"
    )
    pid, master = pty.fork()
    if pid == 0:
        os.execv(program, [str(program), "--", sys.executable, "-c", code])
    try:
        said = b""
        while not said.endswith(b"\n"):
            said += os.read(master, 1000)
        assert said.split()[:2] == [b"True", b"True"]
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(master)
