from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from controller.cli import config
from controller.cli.config import Cluster, Config
from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import KEY, Controller

PIN = "Hey8twCAAZtTJBc8QO7zyOhh+EOMRU6MHdAv5Sb32og="


def test_add_checks_the_key_and_writes_a_private_file(bare: Shell, home: Path, url: str) -> None:
    out = bare.ok("cluster", "add", "-g", "localhost:2222", "default", url, KEY)
    assert out == "Cluster 'default' added (default)\n"
    assert (home / ".flynnrc").stat().st_mode & 0o777 == 0o600
    assert config.load().find("") == Cluster(name="default", url=url, key=KEY, git_address="localhost:2222")
    assert [path.name for path in home.iterdir()] == [".flynnrc"]


def test_add_takes_the_git_address_from_the_cluster(bare: Shell, url: str) -> None:
    bare.ok("cluster", "add", "default", url, KEY)
    assert config.load().find("").git_address == "git.example.test:2222"


def test_the_key_may_come_by_stdin_where_nobody_else_sees_it(
    bare: Shell, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{KEY}\n"))
    bare.ok("cluster", "add", "default", url, "-")
    assert config.load().find("").key == KEY


def test_a_wrong_key_is_not_added(bare: Shell, home: Path, url: str) -> None:
    done = bare("server-add", "default", url, "wrong")
    assert done.code == 77
    assert not (home / ".flynnrc").exists()


def test_a_cluster_that_is_not_up_is_added_unchecked(bare: Shell) -> None:
    done = bare("cluster", "add", "-p", PIN, "--address", "127.0.0.1", "later", "later.test:1", KEY)
    assert done.code == 0
    assert "added unchecked" in done.err
    found = config.load().find("later")
    assert (found.url, found.pin) == ("https://controller.later.test:1", PIN)


def test_the_articles_line_without_a_domain_takes_that_of_the_git_host(
    bare: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Cluster] = []

    def check(cluster: Cluster, *, has_git: bool) -> Cluster:
        seen.append(cluster)
        return cluster

    monkeypatch.setattr("controller.cli.cluster._check", check)
    bare.ok("server-add", "-g", "localhost:2201", "-p", PIN, "default", KEY)
    assert seen == [
        Cluster(name="default", url="https://controller.localhost", key=KEY, pin=PIN, git_address="localhost:2201")
    ]


def test_same_name_needs_force(flynn: Shell, url: str) -> None:
    done = flynn("cluster", "add", "default", url, KEY)
    assert done.code == 73
    assert "-f" in done.err
    assert flynn("cluster", "add", "-f", "default", url, KEY).code == 0
    assert len(config.load().clusters) == 1


def test_list_default_remove(flynn: Shell, url: str) -> None:
    flynn.ok("cluster", "add", "second", url, KEY)
    lines = flynn.ok("cluster").splitlines()
    assert lines[0].split() == ["NAME", "CONTROLLER", "GIT"]
    assert lines[1].split() == ["default", url, "git.example.test:2222", "default"]
    assert flynn.ok("cluster", "default") == "default\n"
    flynn.ok("cluster", "default", "second")
    assert flynn.ok("cluster", "default") == "second\n"
    listed = json.loads(flynn.ok("cluster", "list", "--json"))
    assert [(one["name"], one["is_default"]) for one in listed] == [("default", False), ("second", True)]
    assert KEY not in flynn.ok("cluster", "list", "--json")
    flynn.ok("cluster", "remove", "second")
    assert config.load().find("").name == "default"
    assert flynn("cluster", "remove", "second").code == 66


def test_two_clusters_without_a_default_ask_for_one(flynn: Shell, url: str) -> None:
    flynn.ok("cluster", "add", "second", url, KEY)
    flynn.ok("cluster", "add", "third", url, KEY)
    flynn.ok("cluster", "remove", "default")
    done = flynn("apps")
    assert done.code == 66
    assert "flynn cluster default NAME" in done.err
    assert flynn("-c", "third", "apps").code == 0
    assert flynn("apps", "--cluster", "third").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["../x", "example.test", KEY],
        ["x", "exa mple", KEY],
        ["x", "ftp://example.test", KEY],
        ["-p", "short", "x", "example.test", KEY],
        ["-g", "nohost", "x", "example.test", KEY],
        ["x", "example.test"],
    ],
)
def test_nonsense_is_refused(bare: Shell, home: Path, arguments: list[str]) -> None:
    done = bare("cluster", "add", *arguments)
    assert done.code == 64
    assert not (home / ".flynnrc").exists()


@pytest.mark.parametrize("text", ["nonsense", '[[cluster]]\nname = "x"\n', 'defualt = "x"\n', "\udcff"])
def test_a_broken_file_names_itself(bare: Shell, home: Path, text: str) -> None:
    (home / ".flynnrc").write_bytes(text.encode("utf-8", "surrogateescape"))
    done = bare("apps")
    assert done.code == 64
    assert ".flynnrc" in done.err


def test_what_is_written_reads_back(home: Path) -> None:
    odd = Config(default='a"b', clusters=(Cluster(name='a"b', url="http://x", key="k\\ü\n"),))
    config.save(odd)
    assert config.load() == odd


def test_a_file_that_others_may_read_is_warned_about(flynn: Shell, home: Path) -> None:
    assert flynn("apps").err == ""
    (home / ".flynnrc").chmod(0o644)
    assert "chmod 600" in flynn("apps").err


def test_a_linked_file_stays_a_link(flynn: Shell, home: Path, url: str) -> None:
    (home / ".flynnrc").rename(home / "real")
    (home / ".flynnrc").symlink_to(home / "real")
    flynn.ok("cluster", "add", "second", url, KEY)
    assert (home / ".flynnrc").is_symlink()
    assert "second" in (home / "real").read_text()


def test_flynnrc_says_where(bare: Shell, home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYNNRC", str(home / "elsewhere"))
    bare.ok("cluster", "add", "x", url, KEY)
    assert (home / "elsewhere").exists()
    assert not (home / ".flynnrc").exists()


def test_an_unwritable_place_is_told(bare: Shell, home: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYNNRC", str(home / "no/such/folder"))
    done = bare("cluster", "add", "x", url, KEY)
    assert done.code == 64
    assert "cannot be written" in done.err


def test_trouble_in_between_is_ridden_out(flynn: Shell, controller: Controller) -> None:
    controller.add_app("example")
    controller.trouble.add("away")
    assert flynn("-a", "example", "ps").code == 0
