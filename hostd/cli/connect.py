"""How every command reaches the daemon: its settings, its socket, the paths of its API."""

from __future__ import annotations

import argparse
import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from discovery.wire.blocking import BlockingCaller
from discovery.wire.contexts import client_context
from discovery.wire.errors import Invalid, Unauthorized, Unavailable
from hostd import config as settings_of
from hostd.config import Config
from hostd.types import API_VERSION


def config_of(arguments: argparse.Namespace) -> Config:
    """Return the settings of the node on this machine."""
    file = Path(arguments.config) if arguments.config else None
    flags = vars(arguments)
    return settings_of.load(flags | {"run_dir": flags.get("run_dir") or arguments.node}, file=file)


def _remote(arguments: argparse.Namespace, name: str) -> str:
    return str(getattr(arguments, f"remote_{name}") or os.environ.get(f"HOSTD_{name.upper()}", ""))


def local_config(arguments: argparse.Namespace) -> Config:
    """Return the settings, for what can only be done on the machine itself.

    Raises:
        Invalid: another host is meant.
    """
    if host := _remote(arguments, "host"):
        raise Invalid(f"this is done on the machine itself, not through {host}", hint="without --host and HOSTD_HOST")
    return config_of(arguments)


def caller_of(arguments: argparse.Namespace, timeout_s: float = 30.0) -> BlockingCaller:
    """Return a caller of the daemon that is meant: this machine's, or that of `--host`.

    Raises:
        Unavailable: it does not run here.
        Unauthorized: we may not speak to it.
        Invalid: the address or the certificate cannot be used.
    """
    prefix = f"/v{API_VERSION}"
    if host := _remote(arguments, "host"):
        if not re.fullmatch(r"https://[^/?#]+/?", host):
            raise Invalid(f"host {host!r}", hint="https://HOST:PORT")
        return BlockingCaller(host, timeout_s=timeout_s, tls=_certificate(arguments), prefix=prefix)
    socket = config_of(arguments).api_socket
    try:
        if not socket.exists():
            raise Unavailable(f"hostd is not running here: there is no {socket}", hint="sudo hostd up")
    except PermissionError:
        raise Unauthorized(f"only root may speak to {socket}", hint="try again with sudo") from None
    return BlockingCaller(f"unix://{socket}", timeout_s=timeout_s, prefix=prefix)


def _certificate(arguments: argparse.Namespace) -> ssl.SSLContext:
    """Read our certificate; in a bundle of `hostd tls client` the key and the authority are in the same file."""
    cert = _remote(arguments, "cert")
    if not cert:
        raise Invalid("a certificate is needed", hint="--cert FILE, made by `hostd tls client NAME` on that host")
    key, authority = _remote(arguments, "key") or cert, _remote(arguments, "ca")
    try:
        trusted = Path(authority or cert).read_text()
        if not authority:  # the first is our own, and no authority
            trusted = trusted.partition("-----END CERTIFICATE-----")[2]
        return client_context(cert, key, trusted[trusted.find("-----BEGIN CERTIFICATE-----") :])
    except (OSError, ValueError) as error:
        raise Invalid(f"certificate {cert}: {error}", hint="--cert FILE, --key FILE, --ca FILE, as PEM") from error


def labels_of(words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise Invalid(f"{word!r}", hint="KEY=VALUE")
        found[key] = value
    return found


def labels_query(words: Sequence[str]) -> str:
    return urlencode([("label", f"{key}={value}") for key, value in labels_of(words).items()])


def job_path(job_id: str) -> str:
    return "/jobs/" + quote(job_id, safe="")
