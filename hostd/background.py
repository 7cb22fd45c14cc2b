"""Bring a node up in the background and take it down again, for machines without systemd and for tests.

`up` is safe to repeat at any time. It starts the daemon below a small shell, its keeper, which starts it again
when it is killed: ten seconds without it, and the host's lease ends. `down` ends jobs, discovery and spawner
through the daemon, or, if the daemon is dead, removes by name whatever is left; both leave no trace in the kernel.
Called by `cli`. Refuses to touch a node whose daemon lives but does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from discovery.wire import clock
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import DeadlineExceeded, Internal, ServiceError, Unauthorized, Unavailable
from hostd.config import Config
from hostd.types import HostStatus

UP_S, DOWN_S = 90.0, 300.0
_POLL_S = 0.05
_LOG_TAIL_BYTES = 2000
_KEEPER = """
while :; do
    began=$(date +%s)
    "$@"
    status=$?
    [ $status -ge 128 ] || exit $status
    echo "hostd was killed (status $status), starting it again" >&2
    [ $(($(date +%s) - began)) -ge 10 ] || sleep 1
done
"""
_KEEPER_NAME = "hostd-keeper"


def caller_of(config: Config, *, timeout_s: float = 30.0) -> BlockingCaller:
    """Return a caller for this node's API."""
    return BlockingCaller(f"unix://{config.api_socket}", timeout_s=timeout_s)


def need_root() -> None:
    """Refuse everybody else.

    Raises:
        Unauthorized: we are not root.
    """
    if os.geteuid() != 0:
        raise Unauthorized("this needs root", hint="try again with sudo")


def is_running(config: Config) -> bool:
    """Tell whether a daemon holds this node's lock."""
    try:
        with (config.state_dir / "hostd.lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def up(config: Config) -> HostStatus:
    """Start the daemon unless it runs, and return its status once it is ready.

    Raises:
        Internal: it ended while starting; the message has its last words.
        DeadlineExceeded: it is not ready after `UP_S`.
    """
    need_root()
    process: subprocess.Popen[bytes] | None = None
    if not is_running(config):
        config.state_dir.mkdir(parents=True, exist_ok=True)
        config.state_dir.chmod(0o700)
        began = _size(config.daemon_log)
        with config.daemon_log.open("ab") as output:
            words = [sys.executable, "-P", "-m", "hostd.cli", "daemon", *config.flags()]
            process = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER, _KEEPER_NAME, *words] if config.is_kept else words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd="/",
            )
        if config.is_kept:
            config.keeper_file.write_text(f"{process.pid}\n")
    caller = caller_of(config)
    deadline = clock.monotonic_s() + UP_S
    while clock.monotonic_s() < deadline:
        try:
            return caller.request("GET", "/status", into=HostStatus)
        except Unavailable:
            pass
        if process is not None and process.poll() is not None:
            raise Internal(f"hostd did not start: {_last_words(config.daemon_log, began)}", hint=str(config.daemon_log))
        time.sleep(_POLL_S)
    raise DeadlineExceeded(f"hostd is not ready after {UP_S:g} s", hint=f"see {config.daemon_log}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _last_words(path: Path, began: int) -> str:
    text = path.read_bytes()[began:][-_LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
    return text or "it said nothing"


def down(config: Config, progress: Callable[[str], None]) -> None:
    """End the node with everything on it; nothing running is fine.

    Raises:
        DeadlineExceeded: the daemon lives, but is not done after `DOWN_S`.
    """
    need_root()
    _dismiss_keeper(config)
    if is_running(config):
        _ask(config, progress)
        deadline, next_word = clock.monotonic_s() + DOWN_S, clock.monotonic_s() + 2.0
        while is_running(config):
            if clock.monotonic_s() > deadline:
                raise DeadlineExceeded(f"hostd is not down after {DOWN_S:g} s", hint=f"see {config.daemon_log}")
            if clock.monotonic_s() > next_word:
                next_word += 2.0
                progress(_what_is_left(config))
            time.sleep(_POLL_S)
    from hostd.daemon import remove_leftovers  # after a clean end there is nothing left, and it says so in 0.3 s

    asyncio.run(remove_leftovers(config))


def _dismiss_keeper(config: Config) -> None:
    """End the keeper alone, so that the daemon's end is one."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(config.keeper_file.read_text())
        if f"\0{_KEEPER_NAME}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
    config.keeper_file.unlink(missing_ok=True)


def _ask(config: Config, progress: Callable[[str], None]) -> None:
    deadline = clock.monotonic_s() + UP_S
    while is_running(config):
        try:
            caller_of(config).request("POST", "/shutdown", query={"jobs": ""})
            return
        except Unavailable as error:  # it may be starting
            if clock.monotonic_s() > deadline:
                raise Unavailable(
                    f"hostd lives but does not answer: {error.message}",
                    hint=f"see {config.daemon_log}; its pid is in {config.pid_file}",
                ) from error
            progress("waiting for hostd to answer")
            time.sleep(1.0)


def _what_is_left(config: Config) -> str:
    with contextlib.suppress(ServiceError):
        status = caller_of(config, timeout_s=2.0).request("GET", "/status", into=HostStatus)
        return f"stopping: {status.jobs_running} jobs left"
    return "stopping"
