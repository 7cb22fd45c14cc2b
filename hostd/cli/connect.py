"""How every command reaches the daemon: its settings, its socket, the paths of its API."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import Invalid, Unauthorized, Unavailable
from hostd import config as settings_of
from hostd.config import Config


def config_of(arguments: argparse.Namespace) -> Config:
    file = Path(arguments.config) if arguments.config else None
    flags = vars(arguments)
    return settings_of.load(flags | {"run_dir": flags.get("run_dir") or arguments.node}, file=file)


def caller_of(arguments: argparse.Namespace, timeout_s: float = 30.0) -> BlockingCaller:
    socket = config_of(arguments).api_socket
    try:
        if not socket.exists():
            raise Unavailable(f"hostd is not running here: there is no {socket}", hint="sudo hostd up")
    except PermissionError:
        raise Unauthorized(f"only root may speak to {socket}", hint="try again with sudo") from None
    return BlockingCaller(f"unix://{socket}", timeout_s=timeout_s)


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
