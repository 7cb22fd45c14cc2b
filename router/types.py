"""The router's noun: a route from a domain and path, or a TCP port, to a service."""

from __future__ import annotations

from typing import Literal

import msgspec


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A route. `owner` is the app id that it belongs to; a domain may be `*.example.com`.

    A path starts and ends with `/`.
    A `tcp` route has `port` and no domain. `certificate` and `private_key` are PEM; empty = the default certificate.
    """

    id: str
    kind: Literal["http", "tcp"]
    service: str
    owner: str = ""
    domain: str = ""
    path: str = "/"
    port: int = 0
    is_sticky: bool = False
    certificate: str = ""
    private_key: str = ""
    created_at: float = 0
