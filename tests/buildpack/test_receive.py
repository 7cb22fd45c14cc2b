"""Real pushes with the real git and ssh clients, through git-receive, the blob store and a real compile."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import asyncssh
import pytest

from buildpack import build, doorkeeper, receive
from buildpack.errors import PushRefused
from controller.errors import InvalidName
from controller.types import ProcessType, Release
from discovery.wire.errors import Invalid
from hostd.types import Port, Resources
from tests.buildpack.conftest import DEADLINE_S, Server

SITE = {"index.html": "<h1>hello</h1>", "style.css": "h1 { color: red }"}


async def until(condition: object, what: str) -> None:
    assert callable(condition)
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.02)
    assert condition(), what


@pytest.mark.parametrize("branch", ["master", "main"])
async def test_a_push_builds_releases_and_tells_it_in_the_articles_shape(server: Server, branch: str) -> None:
    server.controller.add_app("example")
    git = server.git()
    await git.commit(SITE, branch)
    pushed = await git("push", server.url("example"), branch)
    assert pushed.status == 0, pushed.text
    wanted = [
        "-----> Building example...",
        "-----> Static app detected",
        "-----> Discovering process types",
        "-----> Compiled slug size is ",
        "-----> Creating release...",
        "=====> Application deployed",
        f"* [new branch]      {branch} -> {branch}",
    ]
    positions = [pushed.text.find(line) for line in wanted]
    assert positions == sorted(positions), pushed.text
    assert -1 not in positions, pushed.text
    release = server.controller.releases[0]
    assert release.processes["web"].args == ("/bin/sh", "/app/.hostd/start", "web")
    assert release.processes["web"].ports == (Port(service="example-web"),)
    assert release.artifact_ids[0] == "stack"
    layer = server.controller.artifacts[release.artifact_ids[1]].layers[0]
    kept = server.blobs / "sha256" / layer.digest[7:9] / layer.digest[7:]
    assert kept.stat().st_size == layer.size_bytes
    assert server.temporary_blobs() == []


async def test_a_builder_that_is_slow_to_start_is_announced(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SILENCE_S", 0.05)
    server.controller.add_app("example")
    server.controller.command = lambda new: ["sh", "-c", 'sleep 1; exec "$0" "$@"', sys.executable, *new.args[1:]]
    git = server.git()
    await git.commit(SITE)
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status == 0, pushed.text
    assert pushed.text.index("-----> Preparing the builder") < pushed.text.index("-----> Static app detected")


async def test_the_build_job_gets_no_key_and_no_grant(server: Server) -> None:
    server.controller.add_app("example")
    git = server.git()
    await git.commit(SITE)
    await git("push", server.url("example"), "master")
    new = server.controller.jobs["job-0"].new
    assert new.artifact_ids == ("build",)
    assert not new.release_env
    assert [volume.name for volume in new.volumes] == ["build-cache-id-example"]
    assert "shelf-key" not in str(new.env)


async def test_a_second_push_keeps_environment_and_process_settings(server: Server) -> None:
    app = server.controller.add_app("example")
    before = ProcessType(resources=Resources(memory_bytes=7), env={"A": "1"}, ports=(Port(service="other"),))
    server.controller.current[app.id] = Release(
        id="r", app_id=app.id, number=1, artifact_ids=(), env={"SECRET": "s"}, processes={"web": before, "old": before}
    )
    git = server.git()
    await git.commit(SITE)
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status == 0, pushed.text
    release = server.controller.releases[0]
    assert release.env == {"SECRET": "s"}
    assert list(release.processes) == ["web"]
    assert release.processes["web"].resources == before.resources
    assert release.processes["web"].ports == before.ports
    assert "SECRET" in server.controller.jobs["job-0"].new.env["APP_ENV"]


async def test_a_clone_brings_back_what_was_pushed(server: Server) -> None:
    server.controller.add_app("example")
    git = server.git()
    await git.commit(SITE, "main")
    await git("push", server.url("example"), "main")
    cloned = await git("clone", "--quiet", server.url("example"), "copy")
    assert cloned.status == 0, cloned.text
    assert (git.folder / "copy" / "index.html").read_text() == SITE["index.html"]


async def test_an_unknown_key_is_named_and_refused(server: Server) -> None:
    server.controller.add_app("example")
    server.key("stranger", is_registered=False)
    git = server.git(key="stranger")
    await git.commit(SITE)
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status != 0
    assert "is not registered here; to add it: flynn key add" in pushed.text
    assert "Permission denied (publickey)" in pushed.text
    assert not list(server.data.iterdir())


async def test_another_user_than_git_is_refused(server: Server) -> None:
    git = server.git()
    await git.commit(SITE)
    pushed = await git("push", server.url("example", user="root"), "master")
    assert pushed.status != 0
    assert "Log in as git" in pushed.text


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ("nosuch", "there is no app named 'nosuch'"),
        ("..", "app name '..' is not allowed"),
        ("../../etc", "is not allowed"),
        ("A", "is not allowed"),
        ("a" * 200, "is not allowed"),
    ],
)
async def test_an_app_that_is_none_is_refused_in_gits_own_words(server: Server, app: str, words: str) -> None:
    git = server.git()
    await git.commit(SITE)
    pushed = await git("push", server.url(app), "master")
    assert pushed.status != 0
    assert words in pushed.text
    assert "access rights" not in pushed.text
    assert not list(server.data.iterdir())


async def test_a_part_of_the_platform_is_not_pushed_to(server: Server) -> None:
    server.controller.add_app("controller", system="true")
    git = server.git()
    await git.commit(SITE)
    pushed = await git("push", server.url("controller"), "master")
    assert pushed.status != 0
    assert "part of the platform" in pushed.text


async def _refused(server: Server, files: dict[str, str]) -> str:
    server.controller.add_app("example")
    git = server.git()
    await git.commit(files)
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status != 0, pushed.text
    assert "pre-receive hook declined" in pushed.text
    assert server.controller.current == {}
    assert server.temporary_blobs() == []
    refs = await git("ls-remote", server.url("example"))
    assert refs.text.strip() == ""
    return pushed.text


async def test_a_repository_with_nothing_to_detect_is_refused(server: Server) -> None:
    text = await _refused(server, {"README": "hello"})
    assert server.controller.releases == []
    assert not list((server.blobs / "sha256").iterdir())
    assert "no buildpack takes this app" in text
    assert "package.json" in text


async def test_a_procfile_that_does_not_parse_is_refused_with_its_line(server: Server) -> None:
    text = await _refused(server, SITE | {"Procfile": "web: true\nworker\n"})
    assert "Procfile line 2: no colon in 'worker'" in text


async def test_a_name_that_the_platform_uses_in_slugs_is_refused(server: Server) -> None:
    text = await _refused(server, SITE | {".hostd/start": "mine"})
    assert "the repository has .hostd" in text


async def test_a_release_that_does_not_come_up_is_told_and_the_branch_stays(server: Server) -> None:
    server.controller.deployment_error = "job web-2 crashed with status 1; it wrote last:\n  out of ideas"
    text = await _refused(server, SITE)
    assert " !     the new release did not come up: job web-2 crashed with status 1; it wrote last:" in text
    assert " !       out of ideas" in text


async def test_another_branch_is_refused_with_a_hint_and_may_be_pushed_as_main(server: Server) -> None:
    server.controller.add_app("example")
    git = server.git()
    await git.commit(SITE, "feature")
    pushed = await git("push", server.url("example"), "feature")
    assert pushed.status != 0
    assert "must include a change to the main or master branch" in pushed.text
    assert "git push flynn BRANCH:main" in pushed.text
    assert server.controller.jobs == {}
    pushed = await git("push", server.url("example"), "feature:main")
    assert pushed.status == 0, pushed.text


async def test_a_build_that_is_killed_in_the_middle_fails_the_push(server: Server) -> None:
    server.controller.add_app("example")
    server.controller.command = lambda new: [
        sys.executable,
        "-c",
        "import time; print('working', flush=True); time.sleep(99)",
    ]
    git = server.git()
    await git.commit(SITE)
    process = await git.start("push", server.url("example"), "master")
    await until(lambda: "job-0" in server.controller.jobs and server.controller.jobs["job-0"].lines, "the build runs")
    server.controller.kill("job-0")
    out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode != 0
    assert "working" in out.decode()
    assert "the build was killed" in out.decode()
    assert server.temporary_blobs() == []


async def test_a_pusher_who_goes_away_stops_the_build(server: Server) -> None:
    server.controller.add_app("example")
    server.controller.command = lambda new: [
        sys.executable,
        "-c",
        "import time; print('working', flush=True); time.sleep(99)",
    ]
    git = server.git()
    await git.commit(SITE)
    process = await git.start("push", server.url("example"), "master")
    await until(lambda: "job-0" in server.controller.jobs and server.controller.jobs["job-0"].lines, "the build runs")
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    await until(lambda: server.controller.stopped == ["job-0"], "the job is stopped")
    await until(lambda: server.temporary_blobs() == [], "the source is removed")
    server.controller.command = lambda new: [sys.executable, *new.args[1:]]

    async def push_again() -> bool:
        return (await git("push", server.url("example"), "master")).status == 0

    async with asyncio.timeout(DEADLINE_S):
        while not await push_again():  # until the first push is over on the server's side, too
            await asyncio.sleep(0.05)


async def test_a_second_push_at_the_same_time_is_refused(server: Server) -> None:
    server.controller.add_app("example")
    server.controller.command = lambda new: [
        sys.executable,
        "-c",
        "import time; print('working', flush=True); time.sleep(99)",
    ]
    git, other = server.git(), server.git("other")
    await git.commit(SITE)
    await other.commit(SITE)
    process = await git.start("push", server.url("example"), "master")
    await until(lambda: "job-0" in server.controller.jobs and server.controller.jobs["job-0"].lines, "the build runs")
    pushed = await other("push", server.url("example"), "master")
    assert pushed.status != 0
    assert "another push to example is in progress" in pushed.text
    server.controller.kill("job-0")
    await asyncio.wait_for(process.communicate(), DEADLINE_S)


async def test_a_controller_that_is_away_is_told(server: Server) -> None:
    server.controller.is_away = True
    git = server.git()
    await git.commit(SITE)
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status != 0
    assert "the controller does not answer" in pushed.text


async def _ssh(server: Server, command: str | None, **options: bool) -> asyncssh.SSHCompletedProcess:
    async with asyncssh.connect(
        "127.0.0.1",
        server.port,
        username="git",
        client_keys=[str(server.key())],
        known_hosts=None,
        config=None,
        agent_path=None,
    ) as connection:
        return await connection.run(command, check=False, timeout=DEADLINE_S, **options)


@pytest.mark.parametrize("command", ["id", "git-upload-archive 'example.git'", "git-receive-pack 'a' 'b'", "sh -c id"])
async def test_other_commands_are_refused(server: Server, command: str) -> None:
    answer = await _ssh(server, command)
    assert answer.exit_status == 1
    assert "only git push and git clone" in str(answer.stderr)


async def test_there_is_no_shell_and_no_terminal(server: Server) -> None:
    answer = await _ssh(server, None)
    assert "there is no shell" in str(answer.stderr)


async def test_there_is_no_forwarding_and_no_sftp(server: Server) -> None:
    async with asyncssh.connect(
        "127.0.0.1", server.port, username="git", client_keys=[str(server.key())], known_hosts=None, config=None
    ) as connection:
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_connection("127.0.0.1", server.blobstore_port)
        with pytest.raises((asyncssh.ChannelOpenError, asyncssh.ChannelListenError)):
            await connection.forward_remote_port("127.0.0.1", 0, "127.0.0.1", 1)
        with pytest.raises(asyncssh.Error):
            await connection.start_sftp_client()


async def test_idle_connections_do_not_lock_pushers_out_for_ever(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "UNAUTHENTICATED_MAX", 3)
    idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
    for reader, _ in idle:
        assert (await reader.readline()).startswith(b"SSH-2.0-hostd")
    with pytest.raises((OSError, asyncssh.Error)):
        await _ssh(server, "id")
    for _, writer in idle:
        writer.close()

    async def answers() -> bool:
        try:
            return (await _ssh(server, "id")).exit_status == 1
        except (OSError, asyncssh.Error):
            return False

    async with asyncio.timeout(DEADLINE_S):
        while not await answers():
            await asyncio.sleep(0.02)


def test_commands_are_read_as_git_writes_them() -> None:
    assert receive.parse_command("git-receive-pack '/example.git'") == receive.Request("receive-pack", "example")
    assert receive.parse_command("git-upload-pack 'example'") == receive.Request("upload-pack", "example")
    assert receive.parse_command("git receive-pack example.git") == receive.Request("receive-pack", "example")
    with pytest.raises(PushRefused):
        receive.parse_command("git-receive-pack 'unfinished")
    with pytest.raises(InvalidName):
        receive.parse_command("git-receive-pack '/a/b.git'")


def test_missing_settings_are_named(host_key: str) -> None:
    with pytest.raises(Invalid, match="SSH_PRIVATE_KEYS is not set"):
        receive.Settings.read({})
    with pytest.raises(Invalid, match="no private key"):
        receive.host_keys("nonsense")
    assert len(receive.host_keys(host_key + host_key)) == 2
