"""Settings come from one table, nonsense is refused with its name, and paths follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from discovery.wire.errors import Invalid
from hostd import config


def test_paths_follow_from_the_directories(tmp_path: Path) -> None:
    read = config.load({"state_dir": str(tmp_path / "s"), "run_dir": "/run/x"}, file=tmp_path / "none")
    assert read.api_socket == Path("/run/x/api/hostd.sock")
    assert read.discovery_socket == Path("/run/x/discovery/discovery.sock")
    assert read.database == tmp_path / "s/hostd.db"
    assert read.gateway == "100.100.0.1"


def test_flags_carry_all_settings_to_another_process(tmp_path: Path) -> None:
    read = config.load({"bridge": "br9", "has_discovery": "false", "ended_keep_s": "5"}, file=tmp_path / "none")
    words = dict(zip(*[iter(read.flags())] * 2, strict=True))
    flags = {setting.name: words[setting.flag] for setting in config.SETTINGS}
    assert config.load(flags, file=tmp_path / "none") == read


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host_id", "a-b"),
        ("bridge", "eth 0"),
        ("bridge", "averylongbridge"),
        ("subnet", "100.100.0.0/30"),
        ("subnet", "nonsense"),
        ("host_ip", "300.1.1.1"),
        ("nat_backend", "pf"),
        ("port_low", "0"),
        ("cgroup_parent", "../x"),
        ("run_dir", "/run/" + "x" * 120),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(Invalid, match=name):
        config.load({name: value}, file=tmp_path / "none")


def test_ports_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="port_low"):
        config.load({"port_low": "60000", "port_high": "50000"}, file=tmp_path / "none")


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "hostd.toml"
    file.write_text('brigde = "x"\n')
    with pytest.raises(Invalid, match="brigde"):
        config.load(file=file)


def test_a_given_address_is_kept() -> None:
    read = config.load({"host_ip": "192.0.2.7"}, file=Path("/nonexistent"))
    assert config.with_host_ip(read).host_ip == "192.0.2.7"
