"""The spawner and its child, for real: what a job can see, what it cannot, and what outlives whom."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from discovery.wire.errors import Conflict, Invalid
from hostd.errors import JobExists, JobNotFound, LaunchFailed
from hostd.runtime.process import SCRIPT, Spawned, Spawner, SpawnRequest
from hostd.runtime.seccomp import SeccompCache
from rootfs.mounts import Bind
from tests.hostd.isolation import DEADLINE_S, PATH, Isolation, exit_of, gone, read_all, run, spawner_in

pytestmark = pytest.mark.needs_root


@pytest.fixture
def isolation(tmp_path: Path) -> Isolation:
    return Isolation(tmp_path / "jobs")


@pytest.fixture(params=[True, False], ids=["seed", "copies"])
async def spawner(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Spawner]:
    async with spawner_in(tmp_path / "run", may_have_seed=request.param) as spawner:
        copies = "copies of a seed" if request.param else "copies of the spawner, no seed: turned off"
        assert spawner.kind_of_children == copies
        yield spawner
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert sorted(os.listdir(tmp_path / "run")) == ["root", "spawner.log"]
    assert (tmp_path / "run" / "spawner.log").read_text() == ""


def plain(job_id: str, command: str, **fields: object) -> SpawnRequest:
    settings: dict[str, object] = {"env": {"PATH": PATH}} | fields
    return SpawnRequest(id=job_id, args=("sh", "-c", command), **settings)  # type: ignore[arg-type]


async def removed(cgroup: Path) -> None:
    """Remove a cgroup: the kernel may let go of its last process a moment after that was seen to be dead."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return cgroup.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
            await asyncio.sleep(0.01)


async def line_of(fd: int) -> str:
    """Read until a line is there, or the end."""

    def read() -> bytes:
        found = b""
        while not found.endswith(b"\n") and (chunk := os.read(fd, 4096)):
            found += chunk
        return found

    return (await asyncio.wait_for(asyncio.to_thread(read), DEADLINE_S)).decode()


class TestIsolation:
    async def test_a_job_sees_only_itself(self, spawner: Spawner, isolation: Isolation) -> None:
        script = "echo $$; hostname; ls /sys/class/net; ps -e -o comm=; ls /proc/1/fd; env"
        status, out, err = await run(spawner, isolation.request("alone", "sh", "-c", script))
        assert (status, err) == (0, "")
        words = out.split("\n")
        assert words[1:3] == ["alone", "lo"]
        assert int(words[0]) < 5
        assert words[3:6] == [".hostd-init", "sh", "ps"]
        assert words[6:9] == ["0", "1", "2"]
        assert set(words[9:]) == {f"PATH={PATH}", "PWD=/", ""}

    async def test_every_namespace_is_its_own(self, spawner: Spawner, isolation: Isolation) -> None:
        names = ("mnt", "pid", "net", "uts", "ipc", "cgroup")
        paths = [f"/proc/self/ns/{name}" for name in names]
        _, out, _ = await run(spawner, isolation.request("ns", "readlink", *paths))
        assert len(out.split()) == len(names)
        assert not set(out.split()) & {os.readlink(path) for path in paths}

    async def test_rights_are_gone_for_good(self, spawner: Spawner, isolation: Isolation, tmp_path: Path) -> None:
        seccomp = str(SeccompCache(tmp_path / "seccomp").path_for(("CHOWN", "KILL", "SETUID", "SETGID")))
        request = isolation.request("rights", "cat", "/proc/self/status", seccomp_path=seccomp)
        _, out, _ = await run(spawner, request)
        facts = dict(line.split(":\t", 1) for line in out.splitlines())
        allowed = f"{1 << 0 | 1 << 5 | 1 << 6 | 1 << 7:016x}"
        assert [facts[name] for name in ("CapPrm", "CapEff", "CapBnd")] == [allowed] * 3
        assert [facts[name] for name in ("CapInh", "CapAmb")] == ["0" * 16] * 2
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
        assert facts["SigIgn"] == facts["SigBlk"] == "0" * 16

    async def test_the_kernel_refuses_what_the_profile_does(
        self, spawner: Spawner, isolation: Isolation, tmp_path: Path
    ) -> None:
        seccomp = str(SeccompCache(tmp_path / "seccomp").path_for(()))
        script = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); print(libc.syscall(246), ctypes.get_errno())"
        machine = os.uname().machine
        script = script.replace("246", {"x86_64": "246", "aarch64": "104"}[machine])  # kexec_load
        request = isolation.request("kexec", "/usr/bin/python3", "-Ic", script, seccomp_path=seccomp)
        _, out, err = await run(spawner, request)
        assert out.split() == ["-1", "1"], err  # EPERM, by the profile's own rule

    async def test_keys_of_the_host_are_not_at_hand(self, spawner: Spawner, isolation: Isolation) -> None:
        script = "import ctypes; print(ctypes.CDLL(None).syscall(NUMBER, 0, -3, 0))"  # the session keyring's id
        script = script.replace("NUMBER", {"x86_64": "250", "aarch64": "219"}[os.uname().machine])
        found = set()
        for name in ("one", "two"):
            _, out, _ = await run(spawner, isolation.request(name, "/usr/bin/python3", "-Ic", script))
            found.add(int(out))
        _, out, _ = await run(spawner, plain("plain", f"/usr/bin/python3 -Ic '{script}'"))
        assert len(found) == 2
        assert int(out) not in found

    async def test_proc_and_sys_cannot_be_written(self, spawner: Spawner, isolation: Isolation) -> None:
        script = "echo 1 > /proc/sys/kernel/hostname; echo 1 > /proc/sys/vm/swappiness; echo 1 > /sys/kernel/mm/ksm/run"
        status, _, err = await run(spawner, isolation.request("ro", "sh", "-c", script))
        assert status != 0
        assert err.count("Read-only file system") == 3

    async def test_the_users_process_has_no_capability(self, spawner: Spawner, isolation: Isolation) -> None:
        request = isolation.request("user", "sh", "-c", "id; grep CapEff /proc/self/status", uid=1234, gid=55)
        _, out, _ = await run(spawner, request)
        assert out.startswith("uid=1234 gid=55 groups=55\n")
        assert out.split()[-1] == "0" * 16

    async def test_a_symlink_of_the_image_cannot_lead_a_mount_to_the_host(
        self, spawner: Spawner, isolation: Isolation, tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (tmp_path / "secret").write_text("mounted\n")
        request = isolation.request(
            "escape",
            "cat",
            f"{outside}/file",
            binds=[Bind(source=str(tmp_path / "secret"), target="/trap/file", is_read_only=True, is_file=True)],
        )
        (isolation.directory / "lower" / "trap").symlink_to(outside)
        (isolation.directory / "lower" / str(outside)[1:]).mkdir(parents=True)
        status, out, err = await run(spawner, request)
        assert (status, out, err) == (0, "mounted\n", "")
        assert list(outside.iterdir()) == []

    async def test_mount_points_are_made_with_their_parents(
        self, spawner: Spawner, isolation: Isolation, tmp_path: Path
    ) -> None:
        (tmp_path / "volume").mkdir()
        (tmp_path / "file").write_text("f")
        binds = [
            Bind(source=str(tmp_path / "volume"), target="/data/deep/volume", is_read_only=False),
            Bind(source=str(tmp_path / "file"), target="/etc/some/where/file", is_read_only=True, is_file=True),
        ]
        script = "echo kept > /data/deep/volume/x; cat /etc/some/where/file; echo no > /etc/some/where/file"
        _, out, err = await run(spawner, isolation.request("binds", "sh", "-c", script, binds=binds))
        assert out == "f"
        assert "Read-only" in err
        assert (tmp_path / "volume" / "x").read_text() == "kept\n"

    async def test_a_dangling_link_gives_way_to_a_file_to_bind_on(
        self, spawner: Spawner, isolation: Isolation, tmp_path: Path
    ) -> None:
        (tmp_path / "resolv").write_text("nameserver 192.0.2.1\n")
        bind = Bind(source=str(tmp_path / "resolv"), target="/etc/resolv.conf", is_read_only=True, is_file=True)
        request = isolation.request("link", "cat", "/etc/resolv.conf", binds=[bind])
        (isolation.directory / "lower" / "etc" / "resolv.conf").symlink_to("../run/nobody/resolv.conf")
        assert await run(spawner, request) == (0, "nameserver 192.0.2.1\n", "")

    async def test_the_open_files_limit_is_cut_to_what_we_may_give(
        self, spawner: Spawner, isolation: Isolation
    ) -> None:
        request = isolation.request("limit", "sh", "-c", "ulimit -n; ulimit -Hn", rlimits={"NOFILE": 321})
        assert (await run(spawner, request))[1].split() == ["321", "321"]
        request = isolation.request("limit2", "sh", "-c", "ulimit -n", rlimits={"NOFILE": 1 << 40})
        assert 1024 <= int((await run(spawner, request))[1]) < 1 << 40

    async def test_it_starts_inside_its_cgroup(self, spawner: Spawner, isolation: Isolation) -> None:
        name = f"hostd-test-{os.getpid()}"
        roots = [Path("/sys/fs/cgroup") / each for each in ("pids", "memory")]
        if not all((root / "cgroup.procs").exists() for root in roots):
            roots = [Path("/sys/fs/cgroup")]
        for root in roots:
            (root / name).mkdir()
        try:
            procs = tuple(str(root / name / "cgroup.procs") for root in roots)
            request = isolation.request("group", "sh", "-c", "cat /proc/self/cgroup; sleep 60", cgroup_procs=procs)
            fds = await spawner.spawn(request)
            for each in procs:
                assert str(fds.pid) in Path(each).read_text().split()
            await spawner.kill("group")
            seen = await read_all(fds.stdout_fd)
            os.close(fds.stderr_fd)
            assert name not in seen  # its cgroup namespace begins there
            await spawner.ack("group")
        finally:
            for root in roots:
                await removed(root / name)

    async def test_its_network_is_the_one_made_for_it(self, spawner: Spawner, isolation: Isolation) -> None:
        netns = await spawner.create_netns("n1")
        request = isolation.request(
            "net", "readlink", "/proc/self/ns/net", netns="n1", namespaces=("mount", "pid", "uts", "ipc", "cgroup")
        )
        _, out, _ = await run(spawner, request)
        assert out.strip() == f"net:[{os.fstat(netns.netns_fd).st_ino}]"
        os.close(netns.netns_fd)
        os.close(netns.netlink_fd)
        await spawner.drop_netns("n1")


class TestNetns:
    async def test_the_netlink_socket_works_inside_it(self, spawner: Spawner) -> None:
        netns = await spawner.create_netns("inside")
        with socket.socket(fileno=netns.netlink_fd) as netlink:
            assert (netlink.family, netlink.type) == (socket.AF_NETLINK, socket.SOCK_DGRAM)
            # RTM_GETLINK dump, as rtnetlink(7): a new namespace has lo and nothing of ours
            netlink.send(struct.pack("=IHHII", 17, 18, 0x301, 1, 0) + b"\0")
            answer = netlink.recv(65536)
            assert b"lo\0" in answer
        assert os.fstat(netns.netns_fd).st_ino != os.stat("/proc/self/ns/net").st_ino
        os.close(netns.netns_fd)

    async def test_names_are_kept_until_dropped(self, spawner: Spawner) -> None:
        first = await spawner.create_netns("a")
        with pytest.raises(JobExists):
            await spawner.create_netns("a")
        again = await spawner.open_netns("a")
        assert os.fstat(first.netns_fd).st_ino == os.fstat(again.netns_fd).st_ino
        assert (await spawner.listing()).netns == ("a",)
        await spawner.drop_netns("a")
        await spawner.drop_netns("a")
        assert (await spawner.listing()).netns == ()
        with pytest.raises(JobNotFound):
            await spawner.open_netns("a")
        for fd in (*first, *again):
            os.close(fd)

    async def test_the_spawner_itself_stays_in_the_hosts_network(self, spawner: Spawner) -> None:
        before = os.readlink(f"/proc/{spawner.pid}/ns/net")
        for fd in await spawner.create_netns("b"):
            os.close(fd)
        assert os.readlink(f"/proc/{spawner.pid}/ns/net") == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("no-such-thing",), 'exec: "no-such-thing": executable file not found in $PATH'),
            (("/no/such",), 'exec: "/no/such": no such file or directory'),
            (("/etc",), 'exec: "/etc": permission denied'),
        ],
    )
    async def test_a_command_that_is_not_there(
        self, spawner: Spawner, isolation: Isolation, args: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(LaunchFailed) as caught:
            await spawner.spawn(isolation.request("job", *args))
        assert caught.value.message == message
        assert caught.value.detail["step"] == "exec"
        assert (await spawner.listing()).children == ()

    async def test_what_failed_is_named(self, spawner: Spawner, isolation: Isolation) -> None:
        bind = Bind(source="/no/such/source", target="/data", is_read_only=False)
        with pytest.raises(LaunchFailed) as caught:
            await spawner.spawn(isolation.request("job", "true", binds=[bind], uid_base=0))
        assert caught.value.detail == {"step": "mount", "errno": 2, "syscall": "mount", "target": "/data"}
        with pytest.raises(LaunchFailed) as caught:
            await spawner.spawn(isolation.request("job2", "true", working_dir="/no/where"))
        assert (caught.value.detail["step"], caught.value.detail["target"]) == ("working_dir", "/no/where")
        with pytest.raises(LaunchFailed) as caught:
            await spawner.spawn(isolation.request("job3", "true", cgroup_procs=("/no/cgroup.procs",)))
        assert caught.value.detail["step"] == "cgroup"
        assert (await spawner.listing()).children == ()

    async def test_options_that_the_kernel_would_cut_are_refused(self, spawner: Spawner, isolation: Isolation) -> None:
        request = isolation.request("long", "true")
        assert request.mounts is not None
        steps = [("mount", "overlay", "/", "overlay", 0, "lowerdir=" + ":".join(["/usr"] * 1000)), *request.mounts[1:]]
        with pytest.raises(LaunchFailed, match="5008 bytes"):
            await spawner.spawn(isolation.request("long2", "true", mounts=steps))

    async def test_a_plan_without_a_mount_namespace_is_refused(self, spawner: Spawner, isolation: Isolation) -> None:
        with pytest.raises(Invalid):
            await spawner.spawn(isolation.request("job", "true", namespaces=("pid",)))
        with pytest.raises(JobNotFound):
            await spawner.spawn(plain("job", "true", netns="nobody"))
        with pytest.raises(Invalid):
            await spawner.spawn(SpawnRequest(id="", args=("true",)))

    async def test_a_peer_that_is_not_root_is_turned_away(self, spawner: Spawner, tmp_path: Path) -> None:
        path = tmp_path / "run" / "spawner.sock"
        opened = [parent for parent in path.parents if parent.stat().st_mode & 0o007 == 0]
        for parent in opened:
            parent.chmod(parent.stat().st_mode | 0o005)
        path.chmod(0o666)
        script = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
            's.send(b\'\\0\\0\\0\\x13{"n":1,"op":"list"}\'); print(s.recv(100))'
        )
        done = await asyncio.to_thread(
            subprocess.run,
            ["/usr/bin/python3", "-Ic", script, str(path)],
            cwd="/",
            user=65534,
            group=65534,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.stdout.strip() != "" or "ConnectionResetError" in done.stderr or "BrokenPipe" in done.stderr
        assert done.stdout.strip() in ("", "b''"), done
        log = tmp_path / "run" / "spawner.log"
        assert log.read_text() == "refused a peer of uid 65534\n"
        log.write_text("")
        for parent in opened:
            parent.chmod(parent.stat().st_mode & ~0o007)

    async def test_nonsense_ends_that_connection_only(self, spawner: Spawner, tmp_path: Path) -> None:
        path = str(tmp_path / "run" / "spawner.sock")
        for nonsense in (b"\0\0\0\x04what", b"\xff\xff\xff\xff", b"\0\0\0\x01[", b"\0\0\0\x021x", b"\0\0\0\x0211"):
            with socket.socket(socket.AF_UNIX) as bad:
                bad.settimeout(DEADLINE_S)
                bad.connect(path)
                bad.sendall(nonsense)
                assert bad.recv(100) == b""
        assert (await spawner.listing()).children == ()
        (tmp_path / "run" / "spawner.log").write_text("")

    async def test_a_second_spawner_in_the_same_place_is_refused(self, spawner: Spawner, tmp_path: Path) -> None:
        command = [sys.executable, "-SIE", str(SCRIPT), "--run-dir", str(tmp_path / "run")]
        second = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert second.returncode == 1
        assert "another spawner holds" in second.stderr
        assert (await spawner.listing()).children == ()


class TestStreams:
    async def test_stdin_ends_when_both_ends_are_dropped(self, spawner: Spawner, isolation: Isolation) -> None:
        fds = await spawner.spawn(isolation.request("cat", "cat", has_stdin=True))
        os.write(fds.stdin_fd, b"hello")
        await spawner.close_stdin("cat")
        os.close(fds.stdin_fd)
        assert await read_all(fds.stdout_fd) == "hello"
        assert (await exit_of(spawner, "cat")).status == 0
        os.close(fds.stderr_fd)

    async def test_a_held_back_job_does_not_keep_anothers_stdin_open(
        self, spawner: Spawner, isolation: Isolation
    ) -> None:
        cat = await spawner.spawn(isolation.request("cat", "cat", has_stdin=True))
        held = await spawner.spawn(isolation.request("held", "true", waits=True))
        await spawner.close_stdin("cat")
        os.close(cat.stdin_fd)
        assert (await exit_of(spawner, "cat")).status == 0
        await spawner.kill("held")
        Spawned(0, cat.stdout_fd, cat.stderr_fd).close()
        held.close()

    async def test_without_stdin_it_reads_the_end_at_once(self, spawner: Spawner, isolation: Isolation) -> None:
        assert await run(spawner, isolation.request("null", "cat")) == (0, "", "")

    async def test_output_may_go_to_a_file(self, spawner: Spawner, tmp_path: Path) -> None:
        path = tmp_path / "daemon.log"
        path.write_text("before\n")
        fds = await spawner.spawn(plain("daemon", "echo out; echo err >&2", log_path=str(path)))
        assert fds[1:] == (-1, -1, -1, -1)
        assert (await exit_of(spawner, "daemon")).status == 0
        assert path.read_text() == "before\nout\nerr\n"

    async def test_a_terminal_is_the_jobs_own(self, spawner: Spawner, isolation: Isolation) -> None:
        request = isolation.request(
            "tty", "sh", "-c", "tty; stty size; read x; stty size", has_tty=True, rows=40, columns=99
        )
        fds = await spawner.spawn(request)
        assert fds[1:4] == (-1, -1, -1)
        assert "/dev/pts/0" in await line_of(fds.pty_fd)
        fcntl.ioctl(fds.pty_fd, termios.TIOCSWINSZ, struct.pack("HHHH", 11, 22, 0, 0))
        os.write(fds.pty_fd, b"\n")
        out = await read_all(fds.pty_fd)
        assert re.findall(r"\d+ \d+", out)[-1] == "11 22"
        assert (await exit_of(spawner, "tty")).status == 0

    async def test_control_c_interrupts_the_program(self, spawner: Spawner, isolation: Isolation) -> None:
        fds = await spawner.spawn(isolation.request("int", "sh", "-c", "echo ready; exec sleep 60", has_tty=True))
        assert "ready" in await line_of(fds.pty_fd)
        os.write(fds.pty_fd, b"\x03")
        assert (await exit_of(spawner, "int")).status == 128 + signal.SIGINT
        os.close(fds.pty_fd)

    async def test_another_user_owns_their_terminal(self, spawner: Spawner, isolation: Isolation) -> None:
        request = isolation.request(
            "tty", "sh", "-c", "stat -c %u $(tty); echo x > $(tty)", has_tty=True, uid=77, gid=77
        )
        fds = await spawner.spawn(request)
        assert (await read_all(fds.pty_fd)).split() == ["77", "x"]


class TestLife:
    async def test_a_signal_reaches_the_program_through_its_init(self, spawner: Spawner, isolation: Isolation) -> None:
        script = "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.1; done"
        fds = await spawner.spawn(isolation.request("sig", "sh", "-c", script))
        assert await line_of(fds.stdout_fd) == "ready\n"
        await spawner.signal("sig", signal.SIGUSR1)
        assert await read_all(fds.stdout_fd) == "caught\n"
        assert (await exit_of(spawner, "sig")).status == 5
        os.close(fds.stderr_fd)

    async def test_kill_takes_everything_inside_with_it(self, spawner: Spawner, isolation: Isolation) -> None:
        script = "setsid sh -c 'trap \"\" TERM; sleep 60' & echo ready; wait"
        fds = await spawner.spawn(isolation.request("tree", "sh", "-c", script))
        assert await line_of(fds.stdout_fd) == "ready\n"
        assert (await spawner.kill("tree")).status == 128 + signal.SIGKILL
        assert await read_all(fds.stdout_fd) == ""  # nobody holds the write end
        os.close(fds.stderr_fd)

    async def test_a_process_killed_from_outside_is_noticed(self, spawner: Spawner, isolation: Isolation) -> None:
        fds = await spawner.spawn(isolation.request("victim", "sleep", "60"))
        os.kill(fds.pid, signal.SIGKILL)
        assert (await exit_of(spawner, "victim")).status == 137
        fds.close()

    async def test_a_held_back_program_runs_when_released(self, spawner: Spawner, isolation: Isolation) -> None:
        fds = await spawner.spawn(isolation.request("held", "echo", "now", waits=True))
        assert [child.state for child in (await spawner.listing()).children] == ["waiting"]
        await spawner.start("held")
        await spawner.start("held")
        assert await read_all(fds.stdout_fd) == "now\n"
        os.close(fds.stderr_fd)
        assert (await exit_of(spawner, "held")).status == 0

    async def test_jobs_and_all_they_said_outlive_hostd(self, tmp_path: Path, isolation: Isolation) -> None:
        async with spawner_in(tmp_path / "run") as first:
            ended = await first.spawn(isolation.request("ended", "sh", "-c", "echo last words; exit 3"))
            running = await first.spawn(isolation.request("running", "sh", "-c", "echo on; exec sleep 60"))
            held = await first.spawn(isolation.request("held", "echo", "hi", waits=True))
            for fd in await first.create_netns("kept"):
                os.close(fd)
            for fds in (ended, running, held):
                fds.close()
            await first.close()

            second = await Spawner.open(tmp_path / "run", may_start=False)
            assert second.pid == first.pid
            assert (await exit_of(second, "ended")).status == 3
            listing = await second.listing()
            assert {child.id: child.state for child in listing.children} == {
                "ended": "exited",
                "running": "running",
                "held": "waiting",
            }
            assert listing.netns == ("kept",)
            taken = await second.take("ended")
            assert await read_all(taken.stdout_fd) == "last words\n"
            os.close(taken.stderr_fd)
            await second.ack("ended")
            taken = await second.take("running")
            assert await line_of(taken.stdout_fd) == "on\n"
            taken.close()
            await second.start("held")
            assert (await exit_of(second, "held")).status == 0
            await second.close()

    async def test_quit_refuses_while_something_runs(self, spawner: Spawner) -> None:
        fds = await spawner.spawn(plain("job", "exec sleep 60"))
        with pytest.raises(Conflict):
            await spawner.quit()
        with pytest.raises(Conflict):
            await spawner.ack("job")
        assert (await spawner.kill("job")).status == 137
        fds.close()

    async def test_it_ignores_the_signals_of_a_terminal_and_of_a_service_manager(self, spawner: Spawner) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(spawner.pid, number)
        status, out, _ = await run(spawner, plain("job", "grep SigIgn /proc/self/status"))
        assert (status, out.split()[1]) == (0, "0" * 16)

    async def test_nothing_is_left_open_after_many_jobs(self, spawner: Spawner, isolation: Isolation) -> None:
        def open_files() -> int:
            return len(os.listdir(f"/proc/{spawner.pid}/fd"))

        await run(spawner, isolation.request("first", "true"))
        before = open_files()
        for number in range(10):
            await run(spawner, isolation.request(f"ok{number}", "true"))
            with pytest.raises(LaunchFailed):
                await spawner.spawn(isolation.request(f"bad{number}", "no-such"))
        assert open_files() == before


class TestSeed:
    @pytest.fixture
    async def spawner(self, tmp_path: Path) -> AsyncIterator[Spawner]:
        async with spawner_in(tmp_path / "run") as spawner:
            yield spawner
        assert (tmp_path / "run" / "spawner.log").read_text() == ""

    def seed_of(self, spawner: Spawner) -> int:
        children = Path(f"/proc/{spawner.pid}/task/{spawner.pid}/children").read_text().split()
        (seed,) = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "hostd-seed\n"]
        return seed

    async def test_it_has_nothing_of_the_spawners_memory_and_no_program_of_the_host(self, spawner: Spawner) -> None:
        seed = self.seed_of(spawner)
        names = {line.split(maxsplit=5)[-1].strip() for line in Path(f"/proc/{seed}/maps").read_text().splitlines()}
        assert names <= {"/memfd:hostd-walker (deleted)", "/memfd:hostd-table (deleted)", "[vsyscall]"}
        held = await spawner.spawn(plain("held", "true", waits=True))
        for pid in (seed, held.pid):
            assert os.readlink(f"/proc/{pid}/exe").startswith("/memfd:hostd-child:")
            assert Path(f"/proc/{pid}/exe").read_bytes() == b""
            with pytest.raises(OSError, match=r"busy|permitted"):
                Path(f"/proc/{pid}/exe").write_bytes(b"#!")
        await spawner.kill("held")
        held.close()

    async def test_a_script_that_names_its_own_interpreter_runs_nothing_of_the_host(
        self, spawner: Spawner, isolation: Isolation
    ) -> None:
        request = isolation.request("self", "/self", has_init=False)
        script = isolation.directory / "lower" / "self"
        script.write_text("#!/proc/self/exe\n")
        script.chmod(0o755)
        with pytest.raises(LaunchFailed) as caught:
            await spawner.spawn(request)
        assert caught.value.detail["step"] == "exec"

    async def test_the_next_child_comes_from_a_new_one(self, spawner: Spawner, isolation: Isolation) -> None:
        await run(spawner, isolation.request("first", "true"))
        open_files = len(os.listdir(f"/proc/{spawner.pid}/fd"))
        seed = self.seed_of(spawner)
        os.kill(seed, signal.SIGTERM)  # it has no ear for that
        running = await spawner.spawn(isolation.request("running", "sleep", "60"))
        assert self.seed_of(spawner) == seed
        os.kill(seed, signal.SIGKILL)
        assert await run(spawner, isolation.request("next", "echo", "on")) == (0, "on\n", "")
        assert self.seed_of(spawner) != seed
        await spawner.kill("running")
        running.close()
        await spawner.ack("running")
        assert len(os.listdir(f"/proc/{spawner.pid}/fd")) == open_files

    async def test_it_ends_with_the_spawner(self, tmp_path: Path) -> None:
        spawner = await Spawner.open(tmp_path / "other")
        seed = self.seed_of(spawner)
        os.kill(spawner.pid, signal.SIGKILL)
        await gone(seed)
        await spawner.close()

    async def test_memory_that_ends_in_the_child_costs_that_job_only(
        self, spawner: Spawner, isolation: Isolation
    ) -> None:
        top = Path("/sys/fs/cgroup/memory")
        file = "memory.limit_in_bytes" if top.is_dir() else "memory.max"
        group = (top if top.is_dir() else top.parent) / f"hostd-test-memory-{os.getpid()}"
        seed = self.seed_of(spawner)
        group.mkdir()
        try:
            (group / file).write_text("65536")
            request = isolation.request("poor", "sleep", "60", cgroup_procs=(str(group / "cgroup.procs"),))
            try:
                fds = await spawner.spawn(request)
                fds.close()
                await spawner.kill("poor")
            except LaunchFailed:
                pass
        finally:
            await removed(group)
        assert self.seed_of(spawner) == seed
        assert await run(spawner, isolation.request("rich", "echo", "on")) == (0, "on\n", "")
