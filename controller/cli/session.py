"""What every command needs: the cluster and app that are meant, and questions to the controller.

Everything is found when first needed, so that `flynn version` reads no file and runs no git.
The app is the flag's, else `FLYNN_APP`, else that of the git remote (`flynn` before others) that
leads to a configured cluster; the cluster is the flag's, else `FLYNN_CLUSTER`, else the remote's, else the default.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any, TypeVar, overload
from urllib.parse import quote

from controller.cli.config import Cluster, Config, load
from controller.cli.output import Waiting
from discovery.wire import clock
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import DeadlineExceeded, Invalid, Unavailable

T = TypeVar("T")
REMOTE = "flynn"
TRY_AGAIN_S = 5.0
"""How long a controller that restarts is waited for."""
_APP = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Session:
    """One invocation of the command."""

    def __init__(self, app: str = "", cluster: str = "") -> None:
        self._app = app or os.environ.get("FLYNN_APP", "")
        self._cluster = cluster or os.environ.get("FLYNN_CLUSTER", "")

    @cached_property
    def config(self) -> Config:
        return load()

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster that is meant. Raises `NotFound`."""
        if not self._cluster and not self._app and self._remote:
            return self._remote[0]
        return self.config.find(self._cluster)

    @cached_property
    def app(self) -> str:
        """The app that is meant, as it was named. Raises `Invalid` when nothing says which."""
        if not self._app and self._remote:
            return self._remote[1]
        if not self._app:
            raise Invalid("no app is given", hint="give -a APP, or work in the git repository of an app")
        if not _APP.fullmatch(self._app):
            from controller.types import parse_app_name

            parse_app_name(self._app)
        return self._app

    @cached_property
    def _remote(self) -> tuple[Cluster, str] | None:
        from controller.cli import git

        wanted = self.config.find(self._cluster) if self._cluster else None
        known = {cluster.git_address: cluster for cluster in reversed(self.config.clusters)}
        if default := next((c for c in self.config.clusters if c.name == self.config.default), None):
            known[default.git_address] = default
        for _, url in sorted(git.remotes().items(), key=lambda item: (item[0] != REMOTE, item[0])):
            parsed = git.parse_url(url)
            cluster = known.get(parsed[0]) if parsed else None
            if parsed and wanted and wanted.git_address == parsed[0]:
                cluster = wanted
            if parsed and cluster and (wanted is None or cluster.name == wanted.name) and _APP.fullmatch(parsed[1]):
                return cluster, parsed[1]
        return None

    @cached_property
    def caller(self) -> BlockingCaller:
        return caller_of(self.cluster)

    def path(self, *parts: str) -> str:
        """Return the path of something of the app: `path("jobs", id)` is `/apps/APP/jobs/ID`."""
        return "".join("/" + quote(part, safe="") for part in ("apps", self.app, *parts))

    @overload
    def ask(self, method: str, path: str, into: type[T], body: Any = ..., query: dict[str, str] | None = ...) -> T: ...

    @overload
    def ask(self, method: str, path: str, into: None = ..., body: Any = ..., query: dict[str, str] | None = ...) -> bytes: ...  # fmt: skip  # noqa: E501

    def ask(
        self, method: str, path: str, into: Any = None, body: Any = None, query: dict[str, str] | None = None
    ) -> Any:
        """Ask the controller, showing that we wait. What may be said twice (GET, PUT) is, while it is away.

        Raises:
            ServiceError: what the controller answered, or `Unavailable`.
        """
        caller = self.caller
        deadline = clock.monotonic_s() + TRY_AGAIN_S
        with Waiting("the controller"):
            while True:
                try:
                    return caller.request(method, path, into=into, body=body, query=query)
                except DeadlineExceeded:
                    raise
                except Unavailable:
                    if method not in ("GET", "PUT") or clock.monotonic_s() > deadline:
                        raise
                    time.sleep(0.25)

    def follow(self, path: str, into: type[T], query: dict[str, str] | None = None) -> Iterator[T]:
        """Follow a stream of events to its end."""
        return self.caller.events(path, into, query)


def caller_of(cluster: Cluster, timeout_s: float = 30.0) -> BlockingCaller:
    """Return what speaks to a cluster's controller."""
    return BlockingCaller(
        cluster.url, key=cluster.key, pin=cluster.pin, connect_to=cluster.address, timeout_s=timeout_s
    )
