"""`flynn key list|add|remove` (and `key-add`): the SSH public keys that may push."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from urllib.parse import quote

from controller.cli import output
from controller.cli.command import Command, Parser
from controller.cli.session import Session
from controller.types import Key, NewKey
from discovery.wire.errors import Invalid, NotFound

DEFAULT_FILES = ("id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub")
FILE_BYTES_MAX = 64 * 1024
_PUBLIC = re.compile(r"(?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+ +AAAA[A-Za-z0-9+/=]+(?: .*)?")


def _add_options(parser: Parser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        help="public key file, `-` for stdin (default: ~/.ssh/id_*.pub, else the agent's)",
    )


def add(session: Session, arguments: Namespace) -> None:
    """Register a public key."""
    text = read_public_key(arguments.file)
    key = session.ask("POST", "/keys", Key, NewKey(public_key=text))
    print(f"Key {key.fingerprint} added")


def read_public_key(file: str | None) -> str:
    """Return the public key that is meant, one line.

    Raises:
        NotFound: there is no such file, or no key to take by default.
        Invalid: it holds no public key. A private key is never sent anywhere.
    """
    if file is None:
        return _default_key()
    if file == "-":
        return parse_public_key(sys.stdin.read(FILE_BYTES_MAX), "stdin")
    path = Path(file).expanduser()
    try:
        with path.open("rb") as stream:
            text = stream.read(FILE_BYTES_MAX).decode("utf-8", "replace")
    except OSError as error:
        raise NotFound(
            f"{path}: {error.strerror}", hint="give the file of a public key, such as ~/.ssh/id_ed25519.pub"
        ) from error
    return parse_public_key(text, str(path))


def parse_public_key(text: str, where: str) -> str:
    """Return the first public key line of `text`.

    Raises:
        Invalid: there is none, or it is a private key.
    """
    if "PRIVATE KEY" in text:
        raise Invalid(f"{where} is a private key", hint=f"give the public one: {where}.pub")
    for line in text.splitlines():
        if _PUBLIC.fullmatch(line.strip()):
            return line.strip()
    raise Invalid(f"{where} holds no SSH public key", hint="a line such as `ssh-ed25519 AAAA… you@host`")


def _default_key() -> str:
    folder = Path.home() / ".ssh"
    files = [folder / name for name in DEFAULT_FILES]
    for path in [*files, *sorted(set(folder.glob("id_*.pub")) - set(files))]:
        if path.is_file():
            return read_public_key(str(path))
    try:
        done = subprocess.run(["ssh-add", "-L"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.returncode == 0 and done.stdout.strip():
        return parse_public_key(done.stdout, "ssh-agent")
    raise NotFound(
        f"no SSH public key: no {folder}/id_*.pub and none in ssh-agent", hint="make one: ssh-keygen -t ed25519"
    )


def show(session: Session, arguments: Namespace) -> None:
    """List the keys."""
    keys = session.ask("GET", "/keys", list[Key])
    if arguments.is_json:
        output.print_json(keys)
        return
    output.table(
        ("FINGERPRINT", "COMMENT", "ADDED"),
        [(key.fingerprint, key.comment, output.age(key.created_at)) for key in keys],
    )


def remove(session: Session, arguments: Namespace) -> None:
    """Take a key's right to push away."""
    wanted = arguments.fingerprint.removeprefix("MD5:")
    keys = session.ask("GET", "/keys", list[Key])
    found = [key for key in keys if wanted in (key.fingerprint, key.sha256, key.comment)]
    if len(found) != 1:
        problem = f"{len(found)} keys match {wanted!r}" if found else f"no key {wanted!r}"
        raise NotFound(problem, hint="`flynn key list` shows the fingerprints")
    session.ask("DELETE", f"/keys/{quote(found[0].fingerprint, safe='')}")
    print(f"Key {found[0].fingerprint} removed")


def _remove_options(parser: Parser) -> None:
    parser.add_argument(
        "fingerprint", metavar="FINGERPRINT", help="MD5 (15:2d:…) or SHA256:… fingerprint, or the comment"
    )


COMMANDS = (
    Command("key list", "list the SSH keys that may push", "flynn key list", show, has_json=True),
    Command(
        "key add",
        "let an SSH public key push",
        "flynn key add ~/.ssh/id_ed25519.pub",
        add,
        _add_options,
        description="Only the public key is read and sent. None is made: `ssh-keygen -t ed25519` does that.",
    ),
    Command(
        "key remove",
        "take a key's right to push away",
        "flynn key remove 15:2d:8e:5a:32:ba:88:74:f1:ad:9d:19:ea:10:1e:45",
        remove,
        _remove_options,
    ),
)
