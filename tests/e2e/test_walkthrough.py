"""The article's story on one node, told by its commands, in order: each test goes on where the last one ended."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.conftest import Node, commit, new_app
from tests.e2e.lab import ROOT, Lab, machine, rules, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.needs_root, pytest.mark.timeout(900)]
EXAMPLES = ROOT / "examples"


def test_up_prints_the_steps_and_the_line_to_paste(node: Node) -> None:
    for step in ("gen-random controller-key", "run-app controller", "deploy-app router", "deploy-app gitreceive"):
        assert re.search(rf"^\d\d:\d\d:\d\d\.\d{{6}} {step}", node.up, re.MULTILINE), step
    assert re.search(r"gen-tls-cert controller-cert pin: \S{44}$", node.up, re.MULTILINE)
    assert re.search(r"flynn cluster add .*-p \S{44} ", node.up)


def test_up_again_is_quick_and_changes_nothing(lab: Lab) -> None:
    def system_jobs() -> dict[str, str]:
        jobs = json.loads(lab.run("hostd", "ps", "--json").out)
        named = {job["spec"]["labels"].get("app_name", ""): str(job["spec"]["id"]) for job in jobs}
        return {app: named[app] for app in ("controller", "router", "gitreceive", "blobstore")}

    assert lab.make("up").status == 0  # what ran before may have been another version's
    before = system_jobs()
    again = lab.make("up")
    assert again.status == 0, again.text
    assert system_jobs() == before


def test_push_scale_route_curl_as_the_article_tells_it(lab: Lab) -> None:
    assert re.fullmatch(r"Key ([0-9a-f]{2}:){15}[0-9a-f]{2} added\n", lab.run("flynn", "key-add").out)
    folder = new_app(lab, "example", EXAMPLES / "nodejs", "master")
    pushed = lab.run("git", "push", "flynn", "master", cwd=folder).text
    for line in (
        "-----> Building example...",
        "-----> Node.js app detected",
        "-----> Installing dependencies",
        "-----> Discovering process types",
        "Procfile declares types -> web",
        "-----> Compiled slug size is",
        "-----> Creating release...",
        "=====> Application deployed",
        "* [new branch]      master -> master",
    ):
        assert line in pushed, line
    lab.run("flynn", "scale", "web=3", cwd=folder)
    lab.run("flynn", "route-add-http", "www.example.test", cwd=folder)
    wait_until("the route serves", lambda: lab.status_of("www.example.test") == 200)
    answers = {lab.curl("www.example.test").out for _ in range(6)}
    ports = sorted(int(re.fullmatch(r"Hello from Flynn on port (\d+)\s*", answer)[1]) for answer in answers)  # type: ignore[index]
    assert len(ports) == 3
    assert min(ports) >= 55000
    assert lab.status_of("example.flynn.test") == 200
    listed = lab.run("flynn", "ps", cwd=folder).out.splitlines()
    assert len([line for line in listed if re.search(r"\bweb\b.*\bup\b", line)]) == 3
    log = lab.run("flynn", "log", cwd=folder).out
    assert "istening" in log


def test_a_flask_app_and_a_static_site_pushed_as_main(lab: Lab) -> None:
    for name, text in (("flask", "Hello from Flynn"), ("static", "<html")):
        folder = new_app(lab, name, EXAMPLES / name, "main")
        pushed = lab.run("git", "push", "flynn", "main", cwd=folder).text
        assert "=====> Application deployed" in pushed
        lab.run("flynn", "scale", "web=1", cwd=folder)
        wait_until(f"{name} serves", lambda name=name: lab.status_of(f"{name}.flynn.test") == 200)  # type: ignore[misc]
        assert text in lab.curl(f"{name}.flynn.test").out


class Client:
    """Asks for a page 100 times a second until told to stop, and counts what came."""

    def __init__(self, lab: Lab, host: str) -> None:
        self.codes: dict[str, int] = {}
        self.bodies: set[str] = set()
        self._stop = threading.Event()
        self._lab, self._host = lab, host
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def _run(self) -> None:
        script = (
            "import http.client, sys, time\n"
            "while True:\n"
            "    begin = time.monotonic()\n"
            "    try:\n"
            "        c = http.client.HTTPConnection(sys.argv[1], 80, timeout=20)\n"
            "        c.request('GET', '/', headers={'Host': sys.argv[2]})\n"
            "        r = c.getresponse(); body = r.read().decode().split(' on ')[0].strip()\n"
            "        print(r.status, body, flush=True); c.close()\n"
            "    except Exception as error:\n"
            "        print('error', repr(error), flush=True)\n"
            "    time.sleep(max(0, 0.04 - (time.monotonic() - begin)))\n"
        )
        process = self._lab.start(
            "/usr/bin/python3", "-c", script, self._lab.host_ip, self._host, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        for line in process.stdout:
            code, _, body = line.strip().partition(" ")
            self.codes[code if code.isdigit() else line.strip()] = self.codes.get(code, 0) + 1
            self.bodies.add(body)
            if self._stop.is_set():
                break
        process.kill()
        process.wait()

    def __enter__(self) -> Client:
        self.begin = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        self.rate = sum(self.codes.values()) / (time.monotonic() - self.begin)


def test_a_second_push_fails_no_request_and_serves_the_new_version(lab: Lab) -> None:
    folder = lab.folder / "example"
    source = next(path for path in folder.glob("*.js"))
    source.write_text(source.read_text().replace("Hello from Flynn", "Hullo from Flynn"))
    commit(lab, folder, "Change the greeting")
    with Client(lab, "www.example.test") as client:
        pushed = lab.run("git", "push", "flynn", "master", cwd=folder).text
        wait_until("only the new version answers", lambda: "Hullo" in lab.curl("www.example.test").out)
    assert "=====> Application deployed" in pushed
    assert set(client.codes) == {"200"}, client.codes
    assert client.rate >= 50, client.rate
    assert client.bodies == {"Hello from Flynn", "Hullo from Flynn"}
    assert all("Hullo" in lab.curl("www.example.test").out for _ in range(6))


def test_a_push_that_crashes_at_start_says_so_and_the_old_release_serves(lab: Lab) -> None:
    folder = lab.folder / "example"
    source = next(path for path in folder.glob("*.js"))
    good = source.read_text()
    source.write_text("console.error('the database is on fire'); process.exit(3);\n" + good)
    commit(lab, folder, "Break it")
    with Client(lab, "www.example.test") as client:
        pushed = lab.try_run("git", "push", "flynn", "master", cwd=folder)
    assert "=====> Application deployed" not in pushed.text
    assert re.search(r"crash|exit(ed)? (with )?(status )?3", pushed.text), pushed.text
    assert set(client.codes) == {"200"}, client.codes
    assert "Hullo" in lab.curl("www.example.test").out
    source.write_text(good)
    commit(lab, folder, "Mend it")


def jobs_of(lab: Lab, app: str, folder: Path | None = None) -> list[dict[str, object]]:
    jobs = json.loads(lab.run("hostd", "ps", "--json").out)
    return [
        job
        for job in jobs
        if job["spec"]["labels"].get("app_name") == app and job["status"] == "running" and job["is_up"]
    ]


def kill_inside(job: dict[str, object]) -> None:
    """Kill -9 the job's program, the child of its init (or the only process)."""
    pid = int(str(job["pid"]))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]) if children else pid, signal.SIGKILL)


def test_a_killed_web_process_is_replaced(lab: Lab) -> None:
    before = {str(job["spec"]["id"]) for job in jobs_of(lab, "example")}  # type: ignore[index]
    kill_inside(jobs_of(lab, "example")[0])
    wait_until(
        "three are up again, one of them new",
        lambda: len(ids := {str(j["spec"]["id"]) for j in jobs_of(lab, "example")}) == 3 and ids != before,  # type: ignore[index]
        10,
    )
    listed = lab.run("flynn", "-a", "example", "ps").out.splitlines()
    assert len([line for line in listed if re.search(r"\bweb\b.*\bup\b", line)]) == 3


@pytest.mark.parametrize("app", ["controller", "gitreceive", "blobstore"])
def test_a_killed_system_job_is_back_within_5_s_and_no_app_needed_it(lab: Lab, app: str) -> None:
    before = {str(job["spec"]["id"]) for job in jobs_of(lab, app)}  # type: ignore[index]
    assert before
    with Client(lab, "www.example.test") as client:
        kill_inside(jobs_of(lab, app)[0])
        wait_until(
            f"{app} is back",
            lambda: {str(j["spec"]["id"]) for j in jobs_of(lab, app)} - before,  # type: ignore[index]
            5,
        )
    assert set(client.codes) == {"200"}, client.codes


def pids_named(comm: str, *, of: Mapping[str, object]) -> list[int]:
    """Return the processes of a job that have this name; others come and go while we look."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            in_job = entry.name.isdigit() and os.readlink(entry / "ns/pid") == os.readlink(f"/proc/{of['pid']}/ns/pid")
            if in_job and (entry / "comm").read_text() == comm + "\n":
                found.append(int(entry.name))
    return found


def test_a_killed_haproxy_serves_again_within_5_s(lab: Lab) -> None:
    router = jobs_of(lab, "router")[0]
    inside = Path(f"/proc/{router['pid']}/root").resolve()
    assert inside
    found = pids_named("haproxy", of=router)
    assert found
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert wait_until("the router serves", lambda: lab.status_of("www.example.test") == 200, 5) < 5


def test_run_passes_the_exit_status_stdin_and_arguments(lab: Lab) -> None:
    folder = lab.folder / "flask"
    assert lab.try_run("flynn", "run", "--", "python", "-c", "import sys; sys.exit(42)", cwd=folder).status == 42
    piped = lab.try_run("flynn", "run", "--", "sort", cwd=folder, stdin="b\na\n")
    assert (piped.status, piped.out) == (0, "a\nb\n")
    done = lab.try_run("flynn", "run", "--", "sh", "-c", "echo out; echo err >&2", cwd=folder)
    assert (done.out, done.err) == ("out\n", "err\n")


def test_run_bash_is_a_usable_terminal(lab: Lab) -> None:
    folder = lab.folder / "flask"
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    screen = b""

    def type_and_expect(text: str, wanted: str) -> None:
        nonlocal screen
        screen = b""
        os.write(master, text.encode())
        deadline = time.monotonic() + 20
        while wanted.encode() not in screen:
            assert time.monotonic() < deadline, (wanted, screen)
            if select.select([master], [], [], 0.2)[0]:
                screen += os.read(master, 65536)

    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = lab.start("flynn", "run", "bash", cwd=folder, stdin=slave, stdout=slave, stderr=slave)
    try:
        type_and_expect("tty; stty size; echo mark$((40+2))\n", "mark42")
        assert b"/dev/pts/" in screen
        assert b"30 100" in screen
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        process.send_signal(signal.SIGWINCH)
        wait_resized = "for i in $(seq 100); do [ \"$(stty size)\" = '40 120' ] && break; sleep 0.1; done; stty size\n"
        type_and_expect(wait_resized, "\r40 120")
        # once it has said so, it is the foreground job: an earlier Ctrl-C would reach bash between the two
        type_and_expect("sh -c 'echo begun$((1+1)); exec sleep 100'\n", "begun2")
        type_and_expect("\x03", "^C")
        type_and_expect("echo after$((1+1))\n", "after2")
        os.write(master, b"exit 7\n")
        assert process.wait(20) == 7
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)
        os.close(slave)


def test_bad_input_gets_a_clear_error_and_leaves_nothing_behind(lab: Lab, tmp_path: Path) -> None:
    folder = lab.folder / "example"
    cases: list[tuple[tuple[str, ...], str]] = [
        (("flynn", "scale", "web=-1"), "web"),
        (("flynn", "scale", "nosuch=1"), "nosuch"),
        (("flynn", "route-add-http", "www.example.test"), "exists"),
        (("flynn", "create", ".."), "app name"),
        (("flynn", "create", "A b"), "app name"),
        (("flynn", "create", "a" * 200), "app name"),
        (("flynn", "create", "example"), "exists"),
        (("flynn", "-a", "nosuch", "ps"), "nosuch"),
    ]
    before = lab.run("flynn", "apps").out, lab.run("flynn", "route", cwd=folder).out
    for command, wanted in cases:
        done = lab.try_run(*command, cwd=folder)
        assert done.status != 0, command
        assert wanted in done.err, (command, done.text)
        assert "Traceback" not in done.text
    assert (lab.run("flynn", "apps").out, lab.run("flynn", "route", cwd=folder).out) == before


def test_a_push_with_an_unknown_key_or_to_no_app_is_refused(lab: Lab) -> None:
    folder = lab.folder / "example"
    stranger = lab.folder / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", stranger], check=True)
    ssh = f"ssh -o IdentitiesOnly=yes -i {stranger} -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=/dev/null"
    refused = lab.try_run("git", "push", "flynn", "master", cwd=folder, environment={"GIT_SSH_COMMAND": ssh})
    assert refused.status != 0
    assert "ermission denied" in refused.err
    url = lab.run("git", "remote", "get-url", "flynn", cwd=folder).out.strip().replace("example", "nosuch")
    missing = lab.try_run("git", "push", url, "master", cwd=folder)
    assert missing.status != 0
    assert "nosuch" in missing.err
    assert "Traceback" not in missing.err


def test_a_push_that_cannot_be_built_says_why_and_deploys_nothing(lab: Lab) -> None:
    folder = lab.folder / "unbuildable"
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing to detect\n")
    lab.run("git", "init", "-q", "-b", "main", cwd=folder)
    commit(lab, folder, "Nothing")
    lab.run("flynn", "create", "unbuildable", cwd=folder)
    undetected = lab.try_run("git", "push", "flynn", "main", cwd=folder)
    assert undetected.status != 0
    assert "package.json" in undetected.err, undetected.err
    (folder / "index.html").write_text("<html></html>")
    (folder / "Procfile").write_text("this is no procfile\n")
    commit(lab, folder, "A bad Procfile")
    unparsed = lab.try_run("git", "push", "flynn", "main", cwd=folder)
    assert unparsed.status != 0
    assert "Procfile" in unparsed.err, unparsed.err
    assert "v1" not in lab.run("flynn", "release", cwd=folder).out
    lab.run("flynn", "delete", "-y", cwd=folder)


def test_env_release_rollback_log_and_delete(lab: Lab) -> None:
    folder = lab.folder / "flask"
    lab.run("flynn", "env", "set", "COLOUR=green", cwd=folder)
    assert lab.run("flynn", "env", "get", "COLOUR", cwd=folder).out == "green\n"
    assert lab.try_run("flynn", "run", "printenv", "COLOUR", cwd=folder).out == "green\n"
    lab.run("flynn", "release", "rollback", "-y", cwd=folder)
    assert "COLOUR" not in lab.run("flynn", "env", cwd=folder).out
    wait_until("it serves", lambda: lab.status_of("flask.flynn.test") == 200)
    job = re.search(r"^(\S+)\s+web", lab.run("flynn", "ps", cwd=folder).out, re.MULTILINE)
    assert job is not None
    lab.run("flynn", "kill", job[1], cwd=folder)
    wait_until("it serves again", lambda: lab.status_of("flask.flynn.test") == 200)


def test_down_leaves_nothing_and_up_brings_the_app_back(node: Node) -> None:
    lab = node.lab
    down = lab.make("down")
    assert down.status == 0, down.text
    after = rules(lab.name)
    for what, before in node.rules_before.items():
        assert after[what] == before, what
    left = machine([lab.folder.name, lab.name])
    for what, before in node.machine_before.items():
        assert left[what] == before, what
    up = lab.make("up")
    assert up.status == 0, up.text
    wait_until("the app serves without a push", lambda: lab.status_of("www.example.test") == 200, 60)
    assert "Hullo" in lab.curl("www.example.test").out
    wait_until("all three are back", lambda: len(jobs_of(lab, "example")) == 3, 30)


def test_kill_9_of_everything_and_up_again(node: Node) -> None:
    """Power cut without the disk: all of ours dies at once, then one command brings all back."""
    lab = node.lab
    pids = [int((lab.run_dir / name).read_text()) for name in ("hostd.pid", "spawner.pid")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    up = lab.make("up")
    assert up.status == 0, up.text
    wait_until("the app serves", lambda: lab.status_of("www.example.test") == 200, 60)


def test_up_says_so_when_port_80_is_taken(node: Node) -> None:
    lab = node.lab
    assert lab.make("down").status == 0
    holder = lab.start("/usr/bin/python3", "-m", "http.server", "80")
    try:
        wait_until("somebody holds port 80", lambda: ":80 " in lab.run("ss", "-Hltn").out)
        refused = lab.make("up")
        assert refused.status != 0
        assert "80" in refused.text
        assert "Traceback" not in refused.text
    finally:
        holder.kill()
        holder.wait()
    assert lab.make("down").status == 0
    assert rules(lab.name)["nft"] == node.rules_before["nft"]
    assert shutil.which("hostd", path=str(lab.bin))
