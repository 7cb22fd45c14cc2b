"""Gives a job the prefixes of the store that its spec grants: a certificate, in force as long as the job lives.

The certificate (`hostd.authority`, a program of its own) names the prefixes and the job, and goes into the job's
secrets. It counts only while the store has a key for it (`discovery.access`), written before the job begins and removed
when it ends; what a host that was away could not remove goes when it is back. A hostd that is away takes
nothing from the jobs that run. Called by `hostd.runtime.launch` as a step, run by `hostd.daemon`.

Refuses where this host has no member of the store, or the store does not listen for jobs.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Collection

from discovery.client import Store
from discovery.wire import clock, roles
from discovery.wire.errors import Internal, ServiceError, Unavailable
from hostd.config import Config
from hostd.remote import address_of, ask_authority
from hostd.runtime.launch import STORE_FILES, user_of
from hostd.types import JobSpec, SecretFile

log = logging.getLogger(__name__)

READY_S = 20.0
"""For so long a job's start waits for the store, which starts together with hostd."""
_CALL_S = 2.0
_RETRY_S = 0.25
_SWEEP_S, _SWEEP_AGAIN_S = 60.0, 1.0
_PEM = re.compile(rb"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----\n", re.DOTALL)


class Grants:
    """What jobs of this host may use of its store."""

    def __init__(self, config: Config) -> None:
        self.url = config.store_url
        self._address = address_of(config.store_address)
        self._tls_dir = str(config.tls_dir)
        self._host_id = config.host_id
        self._store = Store(f"unix://{config.discovery_socket}", timeout_s=_CALL_S)
        self._held: set[str] = set()
        self._late: set[str] = set()
        self._is_late = asyncio.Event()

    async def close(self) -> None:
        """Close the connections; grants stay in force."""
        await self._store.close()

    async def apply(self, spec: JobSpec) -> tuple[SecretFile, ...]:
        """Grant what the spec says, if it says anything, and return the files that the job gets for it.

        Raises:
            Unavailable: the store is away, or does not listen.
        """
        if not spec.store_prefixes:
            return ()
        serial = secrets.randbits(158) | 1 << 158  # always 20 bytes: `ssl` shows bytes, and no leading zeros are lost
        words = ("job", self._tls_dir, self._host_id, spec.id, str(serial), *spec.store_prefixes)
        bundle = await ask_authority(*words)
        self._late.discard(spec.id)
        self._held.add(spec.id)
        deadline_s = clock.monotonic_s() + READY_S
        while True:
            try:
                await self._store.put(self._key(spec.id), f"{serial:X}".encode())
                await self._reach()
                break
            except Unavailable:
                if clock.monotonic_s() > deadline_s:
                    raise
            await asyncio.sleep(_RETRY_S)
        return files_of(bundle, *user_of(spec))

    async def undo(self, job_id: str) -> None:
        """Take back what a job was granted, from its id alone; if the store is away, as soon as it is back."""
        if job_id not in self._held:
            return  # before `run` has looked, too: what is not of a living job goes then
        try:
            await self._store.delete(self._key(job_id))
            self._held.discard(job_id)
        except ServiceError as error:
            log.info("the grant of job %s stays until the store is back: %s", job_id, error.message)
            self._late.add(job_id)
            self._is_late.set()

    async def run(self, living: Callable[[], Collection[str]]) -> None:
        """Take back what is of no living job, for ever."""
        while True:
            try:
                await self._sweep(living)
                pause_s = _SWEEP_S
            except ServiceError as error:
                log.debug("grants could not be looked through: %s", error)
                pause_s = _SWEEP_AGAIN_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._is_late.wait()
                await asyncio.sleep(_SWEEP_AGAIN_S)
            except TimeoutError:
                continue

    async def _sweep(self, living: Callable[[], Collection[str]]) -> None:
        self._is_late.clear()
        mine = self._key("")
        found = [item.key for item in (await self._store.range(mine)).items]
        for job_id in (key.removeprefix(mine) for key in found):
            if job_id in living() and job_id not in self._late:
                self._held.add(job_id)
                continue
            await self._store.delete(mine + job_id)
            log.info("the grant of job %s is taken back", job_id)
            self._held.discard(job_id)
            self._late.discard(job_id)

    def _key(self, job_id: str) -> str:
        return f"{roles.GRANTS}{self._host_id}/{job_id}"

    async def _reach(self) -> None:
        try:
            async with asyncio.timeout(_CALL_S):
                _, writer = await asyncio.open_connection(*self._address)
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"the store does not listen at {self.url}", hint="see discovery.log") from error
        writer.close()


def files_of(bundle: bytes, uid: int, gid: int) -> tuple[SecretFile, ...]:
    """Return what a job finds of its bundle: certificate, key, authority, each in its own file and its user's.

    Raises:
        Internal: it is none.
    """
    parts = _PEM.findall(bundle)
    if len(parts) != 3:
        raise Internal(f"a bundle of {len(parts)} parts")
    named = zip(("STORE_CERT", "STORE_KEY", "STORE_CA"), parts, strict=True)
    return tuple(
        SecretFile(path=STORE_FILES[name], content=part.decode(), mode=0o440, uid=uid, gid=gid) for name, part in named
    )
