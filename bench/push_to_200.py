"""From `git push` of a changed app to the first 200 with the new content, beside a bare `git push` over OpenSSH.

The app is a static site without dependencies that runs as web=1. Each round makes one commit that changes one line, and
pushes it to the app and to a bare repository of an sshd in the same network namespace, in turn. Ours ends with the
first answer that has the new line, asked for every 20 ms; what it does in between is a build in a clean container, a
slug, a release, and a deployment that starts the new process, waits for its health, and routes to it. The bare push
ends when the client does, and nothing runs afterwards.
"""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.measure import Row, interleave, row
from tests.e2e.lab import Lab, sh, wait_until

APP = "bench"
SSHD = "/usr/sbin/sshd"
SSHD_PORT = 2022
ASK_EVERY_S = 0.02
PUSH_S = 120.0


def page(lab: Lab, domain: str) -> str:
    """Return what the app answers, empty if not 200."""
    connection = http.client.HTTPConnection(lab.host_ip, 80, timeout=5)
    try:
        connection.request("GET", "/", headers={"Host": domain})
        response = connection.getresponse()
        body = response.read().decode()
        return body if response.status == 200 else ""
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


@contextmanager
def plain_sshd(lab: Lab) -> Iterator[str]:
    """Run an sshd of our own, with its own key and configuration, and return the URL of a bare repository on it."""
    folder = lab.folder / "sshd"
    folder.mkdir(mode=0o700)
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    sh("git", "init", "-q", "--bare", str(folder / "bare.git"))
    is_locked = any(line.startswith("root:!") for line in Path("/etc/shadow").read_text().splitlines())
    (folder / "config").write_text(
        f"Port {SSHD_PORT}\nListenAddress {lab.host_ip}\nHostKey {folder}/host_key\nPidFile none\n"
        f"AuthorizedKeysFile {lab.home}/.ssh/id_ed25519.pub\nStrictModes no\nPermitRootLogin prohibit-password\n"
        f"PasswordAuthentication no\nUseDNS no\nUsePAM {'yes' if is_locked else 'no'}\n"
    )
    privilege_separation = Path("/run/sshd")  # Debian's sshd insists on it; its service makes it
    is_ours = not privilege_separation.exists()
    privilege_separation.mkdir(mode=0o755, exist_ok=True)
    process: subprocess.Popen[str] | None = None
    try:
        with (folder / "log").open("w") as log:
            process = lab.start(SSHD, "-D", "-e", "-f", str(folder / "config"), stdin=subprocess.DEVNULL, stderr=log)
        url = f"ssh://root@{lab.host_ip}:{SSHD_PORT}{folder}/bare.git"
        wait_until("sshd serves", lambda: lab.try_run("git", "ls-remote", url).status == 0, 10)
        yield url
    finally:
        if process is not None:
            process.kill()
            process.wait()
        if is_ours:
            with suppress(OSError):  # somebody else's sshd may have come to use it
                privilege_separation.rmdir()


class Site:
    """The app: a repository whose commits are made in advance, and two places to push them to."""

    def __init__(self, lab: Lab, bare: str) -> None:
        self._lab, self._bare = lab, bare
        self._folder = lab.folder / APP
        self._folder.mkdir()
        self._git("init", "-q", "-b", "main")
        (self._folder / "style.css").write_text("body { margin: 2em }\n")
        self._number = 0
        self._ready = {"ours": 0, "bare": 0}
        lab.run("flynn", "key-add")
        lab.run("flynn", "create", APP, cwd=self._folder)
        remote = lab.run("git", "remote", "-v", cwd=self._folder).out
        self._domain = f"{APP}.flynn.test"
        assert "flynn" in remote, remote
        self.commit()
        self.push("flynn")
        self.push(self._bare)
        lab.run("flynn", "scale", "web=1", cwd=self._folder)
        wait_until("the site serves", lambda: page(lab, self._domain), 30)
        self._ready = {"ours": 1, "bare": 1}

    def _git(self, *words: str) -> None:
        self._lab.run("git", *words, cwd=self._folder)

    def commit(self) -> None:
        """Change one line of the page."""
        self._number += 1
        (self._folder / "index.html").write_text(f"<!doctype html>\n<p>{self._text(self._number)}</p>\n")
        self._git("add", "-A")
        self._git("commit", "-q", "-m", f"Round {self._number}")

    def _text(self, number: int) -> str:
        return f"this is round {number}."

    @contextmanager
    def pushing(self, remote: str) -> Iterator[subprocess.Popen[str]]:
        """Run `git push`, and have it end well before the next round begins."""
        path = self._lab.folder / "push.log"
        with path.open("w") as log:
            process = self._lab.start(
                "git", "push", remote, "main", cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield process
            status = process.wait(PUSH_S)
        finally:
            process.kill()
            process.wait()
        assert status == 0, f"git push {remote}: {status}\n{path.read_text()}"

    def push(self, remote: str) -> None:
        with self.pushing(remote):
            pass

    def _next(self, arm: str) -> int:
        """Say which commit this arm has to push, and see that it is there: the arm that comes first makes it."""
        self._ready[arm] += 1
        if self._number < self._ready[arm]:
            self.commit()
        return self._ready[arm]

    def ours(self) -> float:
        text = self._text(self._next("ours"))
        begin = time.monotonic()
        with self.pushing("flynn") as process:
            while text not in page(self._lab, self._domain):
                if process.poll() or time.monotonic() - begin > PUSH_S:
                    break
                time.sleep(ASK_EVERY_S)
            else:
                return (time.monotonic() - begin) * 1000
        raise AssertionError(f"{text!r} is not served {PUSH_S:g} s after the push")

    def bare(self) -> float:
        self._next("bare")
        begin = time.monotonic()
        self.push(self._bare)
        return (time.monotonic() - begin) * 1000


def measure(lab: Lab, rounds: int) -> list[Row]:
    """Return the row `push_to_200` of a lab after `make up`."""
    with plain_sshd(lab) as bare:
        site = Site(lab, bare)
        found = interleave({"ours": site.ours, "bare": site.bare}, rounds)
    return [row("push_to_200", found["ours"], found["bare"], "git push over OpenSSH", "ms")]
