"""The git repository that the command is called in: its remotes tell which app and cluster are meant.

Runs the `git` program; without it, or outside a repository, there are simply no remotes.
"""

from __future__ import annotations

import re
import subprocess

from discovery.wire.errors import Invalid

_URL = re.compile(r"ssh://git@(?P<address>[^/]+)/(?P<app>[^/]+?)(?:\.git)?/?")


def url_of(git_address: str, app: str) -> str:
    """Return the URL to push an app to."""
    return f"ssh://git@{git_address}/{app}.git"


def parse_url(url: str) -> tuple[str, str] | None:
    """Return git address and app of a remote URL of ours, `None` for any other."""
    match = _URL.fullmatch(url)
    return (match["address"], match["app"]) if match else None


def remotes() -> dict[str, str]:
    """Return the URL of each remote by name."""
    done = _git("config", "--get-regexp", r"^remote\..*\.url$")
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()] if done else []
    return {line[0].removeprefix("remote.").removesuffix(".url"): line[1] for line in lines if len(line) == 2}


def is_repository() -> bool:
    """Say whether we are inside a git repository."""
    done = _git("rev-parse", "--git-dir")
    return done is not None and done.returncode == 0


def set_remote(name: str, url: str) -> None:
    """Make remote `name` point to `url`, new or not.

    Raises:
        Invalid: git refuses (such as for an impossible name).
    """
    done = _git("remote", "set-url" if name in remotes() else "add", "--", name, url)
    if done is None or done.returncode != 0:
        raise Invalid(f"git remote {name!r}: {done.stderr.strip() if done else 'git is not installed'}")


def remove_remote(name: str) -> None:
    """Forget remote `name`, if there."""
    _git("remote", "remove", name)


def _git(*arguments: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
