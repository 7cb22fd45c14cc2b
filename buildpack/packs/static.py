"""Builds a folder of static files: nginx on `$PORT`, set up by an optional `Staticfile`.

`Staticfile` lines: `root: FOLDER`, `pushstate: enabled` (unknown paths answer index.html), `directory: visible`.
Files whose name starts with a dot, the Procfile and the Staticfile are not served. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from buildpack import output
from buildpack.packs import contract
from buildpack.refusals import BuildRefused

_KEYS = ("root", "pushstate", "directory")
_LIKELY_ROOTS = ("public", "dist", "_site")

# PORT is known when the process starts, so nginx's configuration is made then.
_RUNNER = """\
#!/bin/sh
# Serves this app's files on $PORT.
app=$(cd "${0%/*}/../.." && pwd) || exit 1
run=$(mktemp -d) || exit 1
sed -e "s|@PORT@|${PORT:?}|" -e "s|@APP@|$app|" -e "s|@RUN@|$run|" "$app/.hostd/static/nginx.conf" >"$run/nginx.conf" || exit 1
[ "$(id -u)" != 0 ] || chown www-data "$run"
PATH=$PATH:/usr/sbin
echo "Serving static files on port $PORT"
exec nginx -e stderr -c "$run/nginx.conf" -g 'daemon off;'
"""  # noqa: E501

_CONFIGURATION = """\
worker_processes 1;
pid @RUN@/nginx.pid;
error_log stderr warn;
events { worker_connections 1024; }
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    access_log /dev/stdout combined;
    client_body_temp_path @RUN@/body;
    proxy_temp_path @RUN@/proxy;
    fastcgi_temp_path @RUN@/fastcgi;
    uwsgi_temp_path @RUN@/uwsgi;
    scgi_temp_path @RUN@/scgi;
    sendfile on;
    tcp_nopush on;
    server_tokens off;
    absolute_redirect off;
    gzip on;
    gzip_vary on;
    gzip_types text/css application/javascript application/json image/svg+xml text/plain application/xml;
    server {
        listen @PORT@;
        root @APP@%(root)s;
        index index.html index.htm;
        charset utf-8;
        error_page 404 %(not_found)s;
        location ~ /\\.(?!well-known/) { return 404; }
        location ~ ^/(?:Procfile|Staticfile)$ { return 404; }
        location / {
            %(directory)stry_files $uri $uri/ %(fallback)s;
        }
    }
}
"""


def detect(app: Path) -> str | None:
    """Take an app with a Staticfile or an index.html, also in one of the usual output folders."""
    found = (app / "Staticfile").is_file() or any((folder / "index.html").is_file() for folder in _roots(app))
    return "Static" if found else None


def compile(shop: contract.Workshop) -> None:
    """Leave nginx's configuration and the script that starts it in the app."""
    settings = read_staticfile(shop.app)
    root = _root(shop.app, settings.get("root", ""))
    shown = root.relative_to(shop.app).as_posix()
    output.step(f"Serving {'the whole folder' if shown == '.' else shown + '/'} with nginx")
    is_pushstate = settings.get("pushstate") == "enabled"
    text = _CONFIGURATION % {
        "root": "" if shown == "." else f"/{shown}",
        "not_found": "/404.html" if (root / "404.html").is_file() else "404",
        "directory": "autoindex on;\n            " if settings.get("directory") == "visible" else "",
        "fallback": "/index.html" if is_pushstate else "=404",
    }
    if not (root / "404.html").is_file():
        text = text.replace("        error_page 404 404;\n", "")
    folder = shop.app / ".hostd" / "static"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nginx.conf").write_text(text, encoding="utf-8")
    runner = folder / "serve"
    runner.write_text(_RUNNER, encoding="utf-8")
    runner.chmod(0o755)


def release(app: Path) -> Mapping[str, str]:
    """Name the web process."""
    return {"web": "exec .hostd/static/serve"}


def read_staticfile(app: Path) -> dict[str, str]:
    """Return the settings of the Staticfile, none if there is no such file.

    Raises:
        BuildRefused: a line is no setting; says which line.
    """
    file = app / "Staticfile"
    if not file.is_file():
        return {}
    settings: dict[str, str] = {}
    for number, line in enumerate(file.read_text("utf-8", "replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = line.partition(":")
        if not colon or name.strip() not in _KEYS:
            raise BuildRefused(
                f"Staticfile line {number}: {line.strip()[:60]!r}", f"each line is one of {', '.join(_KEYS)}: VALUE"
            )
        settings[name.strip()] = value.strip()
    return settings


def _roots(app: Path) -> list[Path]:
    return [app, *(app / name for name in _LIKELY_ROOTS)]


def _root(app: Path, wanted: str) -> Path:
    if wanted:
        folder = (app / wanted.strip("/")).resolve()
        if not folder.is_relative_to(app.resolve()) or not folder.is_dir() or set('"{};$\n ') & set(wanted):
            raise BuildRefused(f"Staticfile: root {wanted!r} is no folder of this repository")
        return app / folder.relative_to(app.resolve())
    return next((folder for folder in _roots(app) if (folder / "index.html").is_file()), app)


if __name__ == "__main__":
    contract.main(detect, compile, release)
