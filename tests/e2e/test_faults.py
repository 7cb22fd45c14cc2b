"""What a node does when its parts are killed, its disk is full, its installation interrupted or its program replaced.

Beside the walkthrough, on the same node: apps and a key of its own, removed at the end. Every fault is
timed by something that was seen (a line of a command's output, a job's state), never by the clock.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import commit
from tests.e2e.lab import ROOT, Done, Lab, cgroups, make_lab, sh, wait_until
from tests.e2e.test_walkthrough import Client, kill_inside

pytestmark = [pytest.mark.e2e, pytest.mark.needs_root, pytest.mark.timeout(300)]
DOMAIN = "faulty.flynn.test"
SYSTEM = {"controller": 1, "blobstore": 1, "router": 1, "gitreceive": 1}
SERVES_AGAIN_S = 30.0


class Faulty:
    """The app that the faults happen to: a page that says its version, two instances."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "faulty"
        self.key = lab.folder / "faulty_key"
        self.version = 0
        config = (
            (lab.home / ".ssh" / "config").read_text().replace(str(lab.home / ".ssh" / "id_ed25519"), str(self.key))
        )
        (lab.folder / "faulty_ssh").write_text(config)
        self.environment = {"GIT_SSH_COMMAND": f"ssh -F {lab.folder}/faulty_ssh"}

    def create(self) -> None:
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "faulty@lab", "-f", str(self.key))
        self.lab.run("flynn", "key-add", f"{self.key}.pub")
        self.folder.mkdir()
        self.lab.run("git", "init", "-q", "-b", "main", cwd=self.folder)
        self.lab.run("flynn", "create", "faulty", cwd=self.folder)
        self.change()
        assert self.push().status == 0
        self.lab.run("flynn", "scale", "web=2", cwd=self.folder)

    def remove(self) -> None:
        self.lab.run("flynn", "delete", "-y", cwd=self.folder)
        fingerprint = sh("ssh-keygen", "-l", "-E", "md5", "-f", f"{self.key}.pub").split()[1].removeprefix("MD5:")
        self.lab.run("flynn", "key", "remove", fingerprint)
        shutil.rmtree(self.folder)
        for path in (self.key, self.key.with_suffix(".pub")):
            path.unlink()

    def change(self) -> str:
        """Commit a new version and return what its page says."""
        self.version += 1
        (self.folder / "index.html").write_text(f"version {self.version}")
        commit(self.lab, self.folder, f"Version {self.version}")
        return f"version {self.version}"

    def page(self) -> str:
        return self.lab.curl(DOMAIN).out

    def push(self) -> Done:
        return self.lab.try_run("git", "push", "flynn", "main", cwd=self.folder, environment=self.environment)

    def push_until(self, line: str, act: Callable[[subprocess.Popen[str]], object]) -> Done:
        """Push, do `act` when the output says `line`, and return how the push ended."""
        return told(self.lab, line, act, "git", "push", "flynn", "main", cwd=self.folder, environment=self.environment)

    def check_serves(self, page: str | None = None) -> None:
        wanted = page or f"version {self.version}"
        wait_until(f"{DOMAIN} says {wanted}", lambda: self.page() == wanted, SERVES_AGAIN_S)

    def push_works(self) -> None:
        """A push after the fault: everything is as it should be."""
        page = self.change()
        done = self.push()
        assert done.status == 0, done.text
        self.check_serves(page)


def told(
    lab: Lab,
    line: str,
    act: Callable[[subprocess.Popen[str]], object],
    *command: str,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Run a command, do `act` when its output says `line`, and return how it ended."""
    process = lab.start(
        *command,
        cwd=cwd,
        environment=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    text, has_acted = "", False
    for said in process.stdout:
        text += said
        if line in said and not has_acted:
            has_acted = True
            act(process)
    watchdog.cancel()
    status = process.wait()
    print(f"$ {' '.join(command)}\n{text}")
    assert has_acted, f"it never said {line!r}:\n{text}"
    return Done(status, text, "")


def jobs(lab: Lab) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = json.loads(lab.run("hostd", "ps", "--json").out)
    return listed


def label(job: dict[str, object], name: str) -> str:
    return str(job["spec"]["labels"].get(name, ""))  # type: ignore[index]


def up(lab: Lab, app: str) -> dict[str, int]:
    """Return the jobs of an app that serve: id and pid."""
    return {
        str(job["spec"]["id"]): int(str(job["pid"]))  # type: ignore[index]
        for job in jobs(lab)
        if label(job, "app_name") == app and job["status"] == "running" and job["is_up"]
    }


def pid_of(lab: Lab, part: str) -> int:
    """Return the pid of a part of the node as `hostd status` knows it."""
    features = json.loads(lab.run("hostd", "status", "--json").out)["features"]
    found = re.fullmatch(r"pid (\d+)", features[part])
    assert found is not None, features
    return int(found[1])


def kill_hostd(lab: Lab) -> None:
    pid = int((lab.run_dir / "hostd.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until("hostd is dead", lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), 5)


def _is_zombie(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True  # reaped meanwhile


def restart_hostd(lab: Lab) -> None:
    kill_hostd(lab)
    lab.run("hostd", "up")


def untidy(lab: Lab) -> list[str]:
    """Say what is there besides the wanted jobs and their belongings: nothing, once all has settled."""
    listed = jobs(lab)
    ids = {str(job["spec"]["id"]) for job in listed}  # type: ignore[index]
    wrong = [f"{job['spec']['id']} is {job['status']}" for job in listed if job["status"] != "running"]  # type: ignore[index]
    for app, count in Counter(label(job, "app_name") for job in listed).items():
        wanted = SYSTEM.get(app, 2 if app == "faulty" else count)
        if count != wanted:
            wrong.append(f"{app} has {count} jobs, not {wanted}")
    wrong += [f"cgroup {name}" for name in {path.name for path in cgroups() if path.parent.name == lab.name} - ids]
    wrong += [f"directory {path.name}" for path in (lab.state / "jobs").iterdir() if path.name not in ids]
    inside = ("nsenter", f"--net=/run/netns/{lab.name}", "--")
    ruleset = sh(*inside, "nft", "list", "ruleset")
    wrong += [f"rule of {name}" for name in set(re.findall(r'comment "([^"]+)"', ruleset)) - ids]
    links = len(re.findall(rf"^\d+: hte{lab.index}-", sh(*inside, "ip", "-o", "link"), re.MULTILINE))
    of_jobs = sum(not job["spec"]["has_host_network"] for job in listed)  # type: ignore[index]
    if not of_jobs <= links <= of_jobs + 4:
        wrong.append(f"{links} links for {of_jobs} jobs")
    mounts = re.findall(rf"{re.escape(str(lab.state))}/jobs/([^/ ]+)", Path("/proc/mounts").read_text())
    wrong += [f"mount of {name}" for name in set(mounts) - ids]
    return wrong


def check_tidy(lab: Lab) -> None:
    found: list[str] = []

    def is_tidy() -> bool:
        found[:] = untidy(lab)
        return not found

    try:
        wait_until("nothing is left over", is_tidy, 40)
    except AssertionError:
        raise AssertionError(f"left over: {found}\n{lab.run('hostd', 'ps').out}") from None


@pytest.fixture(scope="module")
def faulty(lab: Lab) -> Iterator[Faulty]:
    made = Faulty(lab)
    made.create()
    yield made
    made.remove()


# hostd


def test_hostd_killed_under_load_costs_no_request_and_no_job(lab: Lab, faulty: Faulty) -> None:
    before = {str(job["spec"]["id"]): job["pid"] for job in jobs(lab)}  # type: ignore[index]
    with Client(lab, DOMAIN) as client:
        for _ in range(2):
            restart_hostd(lab)
        kill_inside_of(lab, "faulty")  # adopted jobs are watched as before
        wait_until("both are up again", lambda: len(up(lab, "faulty")) == 2, 10)
    after = {str(job["spec"]["id"]): job["pid"] for job in jobs(lab)}  # type: ignore[index]
    assert len(before.items() - after.items()) == 1
    # the killed one's connections at that moment are the only ones that may suffer
    assert sum(count for code, count in client.codes.items() if code != "200") <= 8, client.codes
    check_tidy(lab)


def kill_inside_of(lab: Lab, app: str) -> None:
    kill_inside(next(job for job in jobs(lab) if label(job, "app_name") == app))


@pytest.mark.parametrize(
    "line", ["-----> Building", "-----> Static", "-----> Compiled slug", "-----> Creating release", " is up"]
)
def test_hostd_killed_during_a_push(lab: Lab, faulty: Faulty, line: str) -> None:
    before, page = faulty.page(), faulty.change()
    with Client(lab, DOMAIN) as client:
        done = faulty.push_until(line, lambda _: restart_hostd(lab))
        faulty.check_serves(page if done.status == 0 else before)
    assert set(client.codes) == {"200"}, client.codes
    assert "Traceback" not in done.text
    if done.status:
        assert re.search(r"remote: .*(error|lost|failed|gone|ended)", done.text), done.text
        faulty.push_works()
    check_tidy(lab)


def test_hostd_killed_during_scale(lab: Lab, faulty: Faulty) -> None:
    scaling = lab.start("flynn", "scale", "web=6", cwd=faulty.folder, stdout=subprocess.DEVNULL)
    wait_until("the first new one is there", lambda: len(jobs_of(lab, "faulty")) > 2, 10)
    restart_hostd(lab)
    wait_until("six are up", lambda: len(up(lab, "faulty")) == 6, 30)
    assert scaling.wait(30) == 0
    scaling = lab.start("flynn", "scale", "web=2", cwd=faulty.folder, stdout=subprocess.DEVNULL)
    wait_until("the first is going", lambda: len(up(lab, "faulty")) < 6, 10)
    restart_hostd(lab)
    wait_until("two are left", lambda: len(jobs_of(lab, "faulty")) == 2, 30)
    assert scaling.wait(30) == 0
    check_tidy(lab)


def jobs_of(lab: Lab, app: str) -> list[dict[str, object]]:
    return [job for job in jobs(lab) if label(job, "app_name") == app]


# discovery


def test_discovery_killed_under_load_loses_no_request_and_nothing_acknowledged(lab: Lab, faulty: Faulty) -> None:
    acknowledged = []
    before = up(lab, "faulty")
    with Client(lab, DOMAIN) as client:
        for turn in range(3):
            old = pid_of(lab, "discovery")
            for number in range(3):
                lab.run("flynn", "route-add-http", f"r{turn}-{number}.faulty.test", cwd=faulty.folder)
                acknowledged.append(f"r{turn}-{number}.faulty.test")
            os.kill(old, signal.SIGKILL)
            wait_until("discovery is back", lambda old=old: pid_of(lab, "discovery") != old, 10)  # type: ignore[misc]
        for domain in acknowledged:
            wait_until(f"{domain} serves", lambda domain=domain: lab.status_of(domain) == 200, 15)  # type: ignore[misc]
    assert set(client.codes) == {"200"}, client.codes
    listed = lab.run("flynn", "route", cwd=faulty.folder).out
    assert all(domain in listed for domain in acknowledged)
    assert up(lab, "faulty") == before
    faulty.push_works()
    check_tidy(lab)


# controller


@pytest.mark.parametrize("line", ["-----> Creating release", " is up"])
def test_controller_killed_during_a_deployment_goes_on_after(lab: Lab, faulty: Faulty, line: str) -> None:
    page = faulty.change()
    with Client(lab, DOMAIN) as client:
        done = faulty.push_until(line, lambda _: kill_inside_of(lab, "controller"))
        faulty.check_serves(page if done.status == 0 else None)
    assert set(client.codes) == {"200"}, client.codes
    if line == " is up":  # the deployment was recorded: it has to go on
        assert done.status == 0, done.text
    elif done.status:
        assert "Traceback" not in done.text
    wait_until("the controller is back", lambda: len(up(lab, "controller")) == 1, 10)
    faulty.push_works()
    check_tidy(lab)


# spawner, everything


def check_all_back(lab: Lab, faulty: Faulty, page: str | None = None) -> None:
    faulty.check_serves(page)
    for app, count in {**SYSTEM, "faulty": 2}.items():
        wait_until(f"{app} is up", lambda app=app, count=count: len(up(lab, app)) == count, 30)  # type: ignore[misc]
    faulty.push_works()
    check_tidy(lab)


def test_spawner_killed_nobody_notices(lab: Lab, faulty: Faulty) -> None:
    page, old = faulty.page(), pid_of(lab, "spawner")
    with Client(lab, DOMAIN) as client:
        os.kill(old, signal.SIGKILL)
        wait_until("there is a new one", lambda: pid_of(lab, "spawner") != old, 10)
        check_all_back(lab, faulty, page)
    assert set(client.codes) == {"200"}, client.codes


def test_everything_killed_and_only_the_daemon_started(lab: Lab, faulty: Faulty) -> None:
    """A power cut as systemd sees it: nothing runs, `hostd up` is the only command."""
    page, spawner = faulty.page(), pid_of(lab, "spawner")
    kill_hostd(lab)
    os.kill(spawner, signal.SIGKILL)
    lab.run("hostd", "up")
    check_all_back(lab, faulty, page)


# the disk


@contextmanager
def small_disk(lab: Lab, size_bytes: int) -> Iterator[None]:
    """Run the node on a copy of its state on a small file system, and afterwards where it was, as it was then."""
    image, mount_point = lab.folder / "disk.img", lab.folder / "disk"
    lab.run("hostd", "down")
    mount_point.mkdir()
    image.touch()
    os.truncate(image, size_bytes)
    sh("mkfs.ext4", "-q", "-m", "0", str(image))
    sh("mount", "-o", "loop", str(image), str(mount_point))
    sh("cp", "-a", f"{lab.state}/.", str(mount_point))
    sh("mount", "--move", str(mount_point), str(lab.state))
    try:
        lab.run("hostd", "up")
        yield
    finally:
        lab.run("hostd", "down")
        sh("umount", str(lab.state))
        image.unlink()
        mount_point.rmdir()
        lab.run("hostd", "up")


def fill(folder: Path, leave_bytes: int = 0) -> Path:
    """Take all free space of the folder's file system but a little."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        if (size := shutil.disk_usage(folder).free - leave_bytes - 2**20) > 0:
            os.posix_fallocate(file.fileno(), 0, size)
            file.seek(size)
        while shutil.disk_usage(folder).free > leave_bytes:
            try:
                file.write(b"x" * 4096)
            except OSError:  # what is free and not ours
                break
    return ballast


def test_full_disk_is_named_and_no_running_app_feels_it(lab: Lab, faulty: Faulty) -> None:
    before = faulty.page()
    with small_disk(lab, 2 * 1024**3):
        check_all_back(lab, faulty, before)
        _push_to_a_full_disk(lab, faulty, lambda: (fill(lab.state), faulty.push())[1])
        _push_to_a_full_disk(lab, faulty, lambda: faulty.push_until("-----> Building", lambda _: fill(lab.state)))
        ballast = fill(lab.state)
        restart_hostd(lab)
        kill_inside_of(lab, "faulty")
        wait_until("one is down", lambda: len(up(lab, "faulty")) == 1, 10)
        faulty.check_serves()
        ballast.unlink()
        check_all_back(lab, faulty)
        _build_on_a_full_disk(lab)
    faulty.check_serves(before)
    wait_until("git-receive is up", lambda: len(up(lab, "gitreceive")) == 1, 30)


def _push_to_a_full_disk(lab: Lab, faulty: Faulty, push: Callable[[], Done]) -> None:
    page = faulty.page()
    faulty.change()
    with Client(lab, DOMAIN) as client:
        done = push()
    assert done.status != 0
    assert re.search(r"disk.* full|[Nn]o space left|no room", done.text), done.text
    assert "Traceback" not in done.text
    assert (set(client.codes), client.bodies) == ({"200"}, {page}), client.codes
    (lab.state / "ballast").unlink()
    faulty.push_works()
    check_tidy(lab)


def _build_on_a_full_disk(lab: Lab) -> None:
    """Build into an empty store, from what other builds cached, and then without that."""
    store, cache = lab.state / "other", lab.state / "cache"
    for environment in (
        {"HOSTD_STATE_DIR": str(store)},
        {"HOSTD_STATE_DIR": str(store), "HOSTD_CACHE_DIR": str(cache)},
    ):
        ballast = fill(lab.state, 8 * 2**20)
        refused = lab.try_run("hostd", "image", "build", environment=environment)
        assert refused.status != 0
        assert re.search(r"disk|space|GiB free|no room", refused.err), refused.text
        assert "Traceback" not in refused.text
        left = [
            path
            for folder in (store, cache)
            for path in folder.rglob("*")
            if path.is_file() and path.stat().st_size > 2**20
        ]
        assert not left
        ballast.unlink()
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)


def test_down_while_a_push_runs(lab: Lab, faulty: Faulty) -> None:
    served = faulty.page()
    faulty.change()
    downs: list[Done] = []
    done = faulty.push_until("-----> Building", lambda _: downs.append(lab.try_run("hostd", "down")))
    assert downs[0].status == 0, downs[0].text
    assert done.status != 0
    assert not [path for path in cgroups() if path.parent.name == lab.name]
    lab.run("hostd", "up")
    check_all_back(lab, faulty, served)


# the installation


def test_up_interrupted_at_any_point_and_run_again_works(lab: Lab) -> None:
    with make_lab("-b") as other:
        other.environment["HOSTD_PREFIX"] = lab.environment["HOSTD_PREFIX"]
        for line, number in (
            ("base: sha256:", signal.SIGKILL),
            ("system sha256:", signal.SIGINT),
            ("run-app controller", signal.SIGKILL),
            ("add-app controller-inception", signal.SIGINT),
            ("deploy-app router", signal.SIGKILL),
            ("gen-tls-cert controller-cert pin", signal.SIGKILL),
        ):
            cut = told(other, line, lambda process, number=number: os.killpg(process.pid, number), *make_up())  # type: ignore[misc]
            assert cut.status != 0, cut.text
        done = other.try_run(*make_up())
        assert done.status == 0, done.text
        for app, count in SYSTEM.items():
            assert len(up(other, app)) == len(jobs_of(other, app)) == count, app
        assert other.run("flynn", "apps").out.count("\n") == len(SYSTEM) + 1
        check_tidy(other)


def make_up(tree: Path = ROOT) -> tuple[str, ...]:
    return ("make", "-C", str(tree), "--no-print-directory", "up")


def test_up_with_a_changed_program_replaces_the_system_and_no_app_feels_it(lab: Lab, faulty: Faulty) -> None:
    tree = lab.folder / "tree"
    ours = ("hostd", "netns", "discovery", "controller", "router", "buildpack", "rootfs", "vagrant")
    tree.mkdir()
    for name in (*ours, "pyproject.toml", "requirements.lock", "README.md", "Makefile"):
        sh("cp", "-r", str(ROOT / name), str(tree))
    for path in (tree / "controller" / "daemon.py", tree / "router" / "daemon.py"):
        path.write_text(path.read_text() + "\n# a new version\n")
    before = jobs(lab)
    with Client(lab, DOMAIN) as client:
        done = lab.try_run(*make_up(tree))
    assert done.status == 0, done.text
    assert "Restarting hostd" in done.text
    system, apps = ids(before, SYSTEM), ids(before, ("faulty",))
    wait_until("every part of the system is new", lambda: not ids(jobs(lab), SYSTEM) & system, 40)
    assert ids(jobs(lab), ("faulty",)) == apps
    assert set(client.codes) == {"200"}, client.codes
    again = lab.make("up")  # back to the program under test
    assert again.status == 0, again.text
    faulty.push_works()
    check_tidy(lab)


def ids(listed: Iterable[dict[str, object]], apps: Collection[str]) -> set[str]:
    return {str(job["spec"]["id"]) for job in listed if label(job, "app_name") in apps}  # type: ignore[index]
