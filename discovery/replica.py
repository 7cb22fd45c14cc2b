"""What the api, the services and DNS need of the store, whichever way this process has it.

A member has it in its own log (`raft.Member`); an agent has a copy and asks members for the rest
(`mirror.Mirror`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from discovery.membership import MemberStatus
from discovery.operations import Body, Event, Outcome, RangeRequest, RangeResult
from discovery.peerwire import Change
from discovery.state import State


class Replica(Protocol):
    """The store as this process has it; see `raft.Member` for what each raises."""

    state: State
    member_id: str

    @property
    def term(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def is_leader(self) -> bool: ...
    @property
    def cluster_id(self) -> int: ...

    def status(self) -> MemberStatus: ...
    async def change(self, change: Change, /) -> None: ...

    def disk_bytes(self) -> int: ...
    def on_applied(self, listener: Callable[[list[Event]], None], /) -> None: ...
    def check_ready(self) -> None: ...
    async def wait_ready(self) -> None: ...
    async def read(self, request: RangeRequest, /, *, serializable: bool = False) -> RangeResult: ...
    async def propose(self, body: Body, /) -> Outcome: ...
