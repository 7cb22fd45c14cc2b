"""What the router can refuse."""

from __future__ import annotations

from discovery.wire.errors import AlreadyExists, Invalid, NotFound


class RouteNotFound(NotFound):
    code = "route_not_found"


class RouteExists(AlreadyExists):
    code = "route_exists"


class InvalidRoute(Invalid):
    code = "invalid_route"
