"""One node for all end-to-end tests: `make up` in a machine of its own, gone before the next folder's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.lab import Lab, machine, make_lab, rules, sh


@dataclass(frozen=True)
class Node:
    """The lab after `make up`, and what the kernel held before it."""

    lab: Lab
    rules_before: dict[str, str]
    machine_before: dict[str, str]
    up: str


def ssh_setup(lab: Lab) -> None:
    folder = lab.home / ".ssh"
    folder.mkdir(mode=0o700)
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me@lab", "-f", str(folder / "id_ed25519"))
    (folder / "config").write_text(
        f"Host *\n  IdentityFile {folder}/id_ed25519\n  IdentitiesOnly yes\n  StrictHostKeyChecking accept-new\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n"
    )
    lab.run("git", "config", "--global", "user.email", "me@lab.test")
    lab.run("git", "config", "--global", "user.name", "Me")


@pytest.fixture(scope="package")
def node() -> Iterator[Node]:
    if os.getuid() != 0:
        pytest.skip("needs root: it makes namespaces, cgroups and rules")
    with make_lab() as lab:
        ssh_setup(lab)
        rules_before, machine_before = rules(lab.name), machine([lab.folder.name, lab.name])
        up = lab.make("up")
        assert up.status == 0, up.text
        yield Node(lab, rules_before, machine_before, up.text)


@pytest.fixture(scope="package")
def lab(node: Node) -> Lab:
    return node.lab


def new_app(lab: Lab, name: str, source: Path, branch: str) -> Path:
    """Copy an example into a new folder, make it a git repository and an app."""
    folder = lab.folder / name
    sh("cp", "-r", str(source), str(folder))
    lab.run("git", "init", "-q", "-b", branch, cwd=folder)
    commit(lab, folder, "Hello")
    assert lab.run("flynn", "create", name, cwd=folder).out == f"Created {name}\n"
    return folder


def commit(lab: Lab, folder: Path, message: str) -> None:
    lab.run("git", "add", "-A", cwd=folder)
    lab.run("git", "commit", "-q", "-m", message, cwd=folder)
