"""The operator's command: start and stop a node, look at its jobs, run one by hand.

Speaks to the daemon; only `hostd.cli.node` touches the machine itself. A word that is no command runs
`hostd-WORD` from the same directory, as git does, which is how `hostd bootstrap` reaches a room that this
one must not import. One file a noun, imported only when its command is called: starting fast is a feature.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

from discovery.wire.errors import NotFound, ServiceError
from hostd.cli.command import EXIT_CODES, Parser

NOUNS: dict[str, str] = {
    "daemon": "node",
    "up": "node",
    "down": "node",
    "status": "node",
    "version": "node",
    "ps": "job",
    "run": "run",
    "exec": "exec",
    "attach": "attach",
    "events": "events",
    "log": "log",
    "stats": "stats",
    "top": "stats",
    "stop": "job",
    "signal": "job",
    "kill": "job",
    "inspect": "job",
    "forget": "job",
    "tls": "tls",
    "discovery": "discovery",
    "image": "image",
    "volume": "volume",
    "df": "space",
    "gc": "space",
}
"""Each command's file, which has a `declare(commands)` that adds all the commands of the file."""
_WITH_VALUE = frozenset({"--config", "--run-dir", "--host", "--cert", "--key", "--ca"})


_ENVIRONMENT = "HOSTD_HOST, HOSTD_CERT, HOSTD_KEY and HOSTD_CA stand for --host, --cert, --key and --ca."


def parser(nouns: Iterable[str] = NOUNS) -> argparse.ArgumentParser:
    """Make the parser of these commands (and of their files' others), by default of all."""
    top = Parser(
        prog="hostd",
        description="Run jobs on this machine.",
        epilog=f"example:\n  hostd run --image base -- /bin/echo hello\n\n{EXIT_CODES}\n\n{_ENVIRONMENT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--config", default="", metavar="FILE", help="settings file (default: /etc/hostd/hostd.toml)")
    top.add_argument("--run-dir", dest="node", default=None, metavar="DIR", help="where the daemon's sockets are")
    top.add_argument("--host", dest="remote_host", default="", metavar="URL", help="https://HOST:PORT of another host")
    top.add_argument("--cert", dest="remote_cert", default="", metavar="FILE", help="our certificate, for --host")
    top.add_argument("--key", dest="remote_key", default="", metavar="FILE", help="its key, if it is in another file")
    top.add_argument("--ca", dest="remote_ca", default="", metavar="FILE", help="that host's authority, if elsewhere")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for file in dict.fromkeys(NOUNS[noun] for noun in nouns):
        import_module(f"hostd.cli.{file}").declare(commands)
    return top


def _noun(words: Sequence[str]) -> str:
    """Return the command's first word; nothing if there is none, or an option of ours that stands alone."""
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            return word
        if word in _WITH_VALUE:
            next(rest, None)
        elif "=" not in word:
            return ""
    return ""


def _run_other(word: str, arguments: Sequence[str]) -> None:
    """Become `hostd-WORD`, if there is one."""
    name = f"hostd-{word}"
    beside = Path(sys.argv[0]).resolve().parent / name
    program = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if program is None:
        raise NotFound(f"`hostd {word}` is no command", hint="hostd --help lists them")
    os.execv(program, [program, *arguments])  # noqa: S606 — git-style, our own directory first


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        noun = _noun(words)
        if noun and noun not in NOUNS:
            _run_other(noun, words[words.index(noun) + 1 :])
        parsed = parser([noun] if noun else NOUNS).parse_args(words)
        return int(parsed.act(parsed))
    except ServiceError as error:
        print(f"hostd: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"       {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
