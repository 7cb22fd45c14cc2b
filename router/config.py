"""Writes HAProxy's configuration and maps from a table; pure.

HAProxy 2.6 (Debian 12). Source: its configuration manual, sections 4 and 5, and management manual 9.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from router.table import WILDCARD_LABELS_MAX, Backend, Table, has_wildcards

SERVER_OPTIONS = "pool-purge-delay 500ms"
"""Idle pooled connections of a removed server go within half a second: hostd waits for them before it signals."""

FORGED = ("forwarded", "x-forwarded-", "x_forwarded_", "x-real-ip", "x_real_ip", "x-client-ip", "true-client-ip")
"""Beginnings of headers by which apps learn who the client is: the edge says that, nobody else. Underscores, too: CGI
and WSGI take them for dashes."""

REQUEST_ID = "{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9_-]{20,200}$ }"

NOT_FOUND = "No app is routed here.\\nAdd a route: flynn route add http DOMAIN\\n"
UNAVAILABLE = """HTTP/1.0 503 Service Unavailable\r
Content-Type: text/plain\r
Cache-Control: no-store\r
Retry-After: 2\r
Connection: close\r
\r
The app is routed here, but no instance of it is up.\r
See: flynn ps, flynn log, and flynn scale web=1 if it was never scaled.\r
"""


@dataclass(frozen=True)
class Settings:
    """Where HAProxy listens and where its files are. `user` empty: stay who we are."""

    directory: Path
    http_port: int = 80
    https_port: int = 443
    bind_address: str = ""
    user: str = ""

    @property
    def socket(self) -> Path:
        return self.directory / "haproxy.sock"

    @property
    def config_file(self) -> Path:
        return self.directory / "haproxy.cfg"

    @property
    def map_file(self) -> Path:
        return self.directory / "routes.map"

    @property
    def crt_list(self) -> Path:
        return self.directory / "crt-list.txt"

    @property
    def unavailable_file(self) -> Path:
        return self.directory / "503.http"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\") + '"'


def render_map(table: Table) -> str:
    """One line a rule: `host/path/ backend`."""
    return "".join(f"{rule.key} {rule.backend}\n" for rule in table.http)


def _global(settings: Settings) -> list[str]:
    user = [f"    user {settings.user}", f"    group {settings.user}"] if settings.user else []
    return [
        "global",
        "    log stdout format raw local0 warning",
        f"    stats socket {settings.socket} mode 600 level admin expose-fd listeners",
        "    stats timeout 1m",
        "    hard-stop-after 1h",
        "    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets",
        "    tune.ssl.default-dh-param 2048",
        # Sessions that may be resumed, held in memory from the start: the default of 20000 takes 4.8 MiB (measured).
        "    tune.ssl.cachesize 2000",
        *user,
        "",
        "defaults",
        "    log global",
        "    mode http",
        "    option dontlognull",
        "    option dontlog-normal",
        "    option redispatch 1",
        "    retries 3",
        "    retry-on conn-failure",  # nothing was sent yet: the only retry that is always safe
        "    timeout connect 3s",
        "    timeout client 75s",
        "    timeout client-fin 10s",
        "    timeout server 5m",
        "    timeout http-request 30s",
        "    timeout http-keep-alive 75s",
        "    timeout tunnel 1h",
        "    timeout queue 30s",
        f"    errorfile 503 {settings.unavailable_file}",
        "",
    ]


def _frontend(table: Table, settings: Settings) -> list[str]:
    find = f"map_beg({settings.map_file})"
    missing = "!{ var(txn.backend) -m found }"
    lines = [
        "frontend http",
        f"    bind {settings.bind_address}:{settings.http_port}",
        f"    bind {settings.bind_address}:{settings.https_port} ssl crt-list {settings.crt_list} alpn h2,http/1.1",
        *(f"    http-request del-header {name} -m beg" for name in FORGED),
        "    http-request del-header Proxy",  # CGI programs would take it for their HTTP_PROXY
        "    http-request set-header X-Forwarded-For %[src]",
        "    http-request set-header X-Forwarded-Host %[req.hdr(host)]",
        "    unique-id-format %[uuid()]",
        f"    http-request set-header X-Request-Id %[unique-id] unless {REQUEST_ID}",
        "    http-request set-header X-Request-Start t=%[date(),mul(1000)]",
        "    http-request set-header X-Forwarded-Proto https if { ssl_fc }",
        "    http-request set-header X-Forwarded-Proto http unless { ssl_fc }",
        "    http-request set-header X-Forwarded-Port %[dst_port]",
        "    http-request set-var(txn.host) req.hdr(host),field(1,:),lower",
        "    http-request set-var(txn.path) path,concat(/)",
        "    http-request set-var(txn.key) var(txn.host),concat(,txn.path)",
        f"    http-request set-var(txn.backend) var(txn.key),{find}",
    ]
    if has_wildcards(table):
        for labels in range(1, WILDCARD_LABELS_MAX + 1):
            wild = r"var(txn.host),regsub('^([^.]+\.){" + str(labels) + "}','*.'),concat(,txn.path)"
            lines += [
                f"    http-request set-var(txn.wild) {_quoted(wild)} if {missing}",
                f"    http-request set-var(txn.backend) var(txn.wild),{find} if {missing}",
            ]
    return [
        *lines,
        "    use_backend %[var(txn.backend)] if { var(txn.backend) -m found }",
        "    default_backend unknown-host",
        "",
        "backend unknown-host",
        f'    http-request return status 404 content-type text/plain string "{NOT_FOUND}"',
        "",
    ]


def _backend(backend: Backend) -> list[str]:
    lines = [f"backend {backend.name}", f"    mode {backend.mode}", "    balance roundrobin"]
    if backend.mode == "http":
        lines.append("    http-reuse safe")
    if backend.mode == "tcp":
        lines += ["    timeout server 1h"]
    if backend.is_sticky:
        lines.append("    cookie _backend insert indirect nocache httponly")
    for server in backend.servers:
        cookie = f" cookie {server.name}" if backend.is_sticky else ""
        lines.append(f"    server {server.name} {server.host}:{server.port} {SERVER_OPTIONS}{cookie}")
    return [*lines, ""]


def render(table: Table, settings: Settings) -> str:
    """Write the whole configuration file."""
    lines = _global(settings) + _frontend(table, settings)
    for rule in table.tcp:
        lines += [
            f"frontend tcp-{rule.port}",
            f"    bind {settings.bind_address}:{rule.port}",
            "    mode tcp",
            "    timeout client 1h",
            f"    default_backend {rule.backend}",
            "",
        ]
    for backend in table.backends:
        lines += _backend(backend)
    return "\n".join(lines)
