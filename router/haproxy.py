"""Keeps one HAProxy serving a table: starts it, reloads it without a gap, changes servers at run time.

We are the master ourselves: a reload starts a new process that takes the listening sockets from the
old one (`-x`) and tells it to finish (`-sf`), so a bad configuration leaves the old one serving.
The configuration on disk always says what runs: servers added at run time would else vanish with the next
reload. Source: HAProxy 2.6 management manual, sections 3, 4 and 9.3.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
from asyncio.subprocess import Process
from pathlib import Path

from discovery.wire.clock import monotonic_s
from discovery.wire.errors import Internal, Unavailable
from router import certs, config
from router.table import RuleChange, ServerChange, Table, rule_changes, server_changes

log = logging.getLogger(__name__)

START_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 3.0
_PLAIN_KEY = re.compile(r"[a-z0-9.*/A-Z_~:@%+=-]+")


class Haproxy:
    """One data plane. Not safe for concurrent callers: the daemon's loop is the only one."""

    def __init__(self, settings: config.Settings) -> None:
        self.settings = settings
        self.running = Table()
        self._process: Process | None = None
        self._old: list[Process] = []
        self._removed: set[tuple[str, str]] = set()

    @property
    def is_alive(self) -> bool:
        """Whether a process is there that has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    async def apply(self, table: Table) -> None:
        """Make HAProxy serve `table`: at run time where only rules and servers changed, else by a reload.

        Raises:
            Internal: HAProxy refuses the configuration; what ran before goes on.
            Unavailable: it does not come up, such as when a port is taken.
        """
        if self.is_alive and table.shape == self.running.shape:
            if table == self.running:
                return
            try:
                for change in server_changes(self.running, table):
                    await self._change(change)
                for step in rule_changes(self.running, table):
                    await self._change_rule(step)
                self.running = table
                self._write(table)
                return
            except (Internal, Unavailable) as error:
                log.warning("runtime API: %s; reloading instead", error)
        self._write(table)
        await self._start()
        self.running = table
        self._removed.clear()

    async def wait_ended(self) -> int:
        """Wait until the current process ends; return its exit status (negative: signal)."""
        assert self._process is not None
        return await self._process.wait()

    async def drain(self, timeout_s: float) -> None:
        """Stop listening and wait until all that is under way has ended, but not for ever."""
        left = [process for process in [*self._old, *filter(None, [self._process])] if process.returncode is None]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
        try:
            async with asyncio.timeout(timeout_s):
                for process in left:
                    await process.wait()
        except TimeoutError:
            log.warning("connections were still open after %g s", timeout_s)

    async def stop(self) -> None:
        """End all processes at once."""
        for process in [*self._old, *([self._process] if self._process else [])]:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._old.clear()
        self._process = None

    async def forget_removed(self) -> None:
        """Delete servers that were taken out and have no request left; those that have stay for the next turn."""
        for backend, server in sorted(self._removed):
            answer = await self._command(f"del server {backend}/{server}")
            if "deleted" in answer.lower() or "no such" in answer.lower():
                self._removed.discard((backend, server))

    def _write(self, table: Table) -> None:
        settings = self.settings
        certs.write_all(settings.directory, settings.crt_list, table.certificates)
        certs.write_private(settings.map_file, config.render_map(table))
        certs.write_private(settings.unavailable_file, config.UNAVAILABLE)
        certs.write_private(settings.config_file, config.render(table, settings))

    async def _start(self) -> None:
        old = self._process if self.is_alive else None
        takeover = []
        if old is not None:
            takeover = ["-x", str(self.settings.socket), "-sf", str(old.pid)]
        else:
            self.settings.socket.unlink(missing_ok=True)
        said = self.settings.directory / "haproxy.err"
        command = ["haproxy", "-db", "-f", str(self.settings.config_file), *takeover]
        with said.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stderr=stderr)
        try:
            await self._wait_serving(process, said)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        self._process = process
        self._old = [p for p in [*self._old, *([old] if old else [])] if p.returncode is None]

    async def _wait_serving(self, process: Process, said: Path) -> None:
        deadline = monotonic_s() + START_TIMEOUT_S
        while monotonic_s() < deadline:
            if process.returncode is not None:
                text = said.read_text(errors="replace").strip() or f"exit status {process.returncode}"
                if "cannot bind" in text.lower():
                    raise Unavailable(f"HAProxy cannot listen: {_binding(text)}", hint="free that port: it tries again")
                raise Internal(f"HAProxy refuses its configuration: {text[-2000:]}")
            if await self._answering_pid() == process.pid:
                return
            await asyncio.sleep(0.02)
        raise Unavailable(f"HAProxy did not answer within {START_TIMEOUT_S:g} s")

    async def _answering_pid(self) -> int:
        try:
            answer = await self._command("show info")
        except Unavailable:
            return 0
        return next((int(line[4:]) for line in answer.splitlines() if line.startswith("Pid:")), 0)

    async def _change(self, change: ServerChange) -> None:
        name = f"{change.backend}/{change.server.name}"
        if change.verb == "remove":
            # maint: no new request; what is in flight ends by itself
            await self._expect(f"set server {name} state maint", "")
            self._removed.add((change.backend, change.server.name))
            return
        if (change.backend, change.server.name) in self._removed:
            self._removed.discard((change.backend, change.server.name))
            await self._expect(f"set server {name} state ready", "")
            return
        address = f"{change.server.host}:{change.server.port}"
        await self._expect(f"add server {name} {address} {config.SERVER_OPTIONS}", "registered")
        await self._expect(f"enable server {name}", "")

    async def _change_rule(self, change: RuleChange) -> None:
        key = change.rule.key
        if not _PLAIN_KEY.fullmatch(key):  # such as a `;`, which begins a new command on HAProxy's socket
            raise Internal(f"the rule {key!r} cannot be said at run time")
        backend = "" if change.verb == "del" else f" {change.rule.backend}"
        await self._expect(f"{change.verb} map {self.settings.map_file} {key}{backend}", "")

    async def _expect(self, command: str, wanted: str) -> None:
        answer = (await self._command(command)).strip()
        if wanted not in answer.lower() or (not wanted and answer):
            raise Internal(f"HAProxy answered {answer[:200]!r} to {command!r}")

    async def _command(self, command: str) -> str:
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(str(self.settings.socket))
                try:
                    writer.write(command.encode() + b"\n")
                    await writer.drain()
                    return (await reader.read()).decode("utf-8", "replace")
                finally:
                    writer.close()
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"HAProxy's socket: {error or 'no answer'}") from error


def _binding(text: str) -> str:
    line = next((line for line in text.splitlines() if "cannot bind" in line.lower()), text)
    return line.split(":", 1)[-1].strip()[-200:]
