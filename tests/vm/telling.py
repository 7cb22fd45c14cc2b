"""Says at once why a test failed, and how long each took that was slow: `-p tests.vm.telling`.

A run in the virtual machine takes long, and one that is cut off never comes to pytest's own report.
"""

from __future__ import annotations

from pathlib import Path

import pytest

SLOW_S = 10.0
"""By the virtual machine's clock: what takes longer is named where it happens."""


class Telling:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            text = f"{report.longreprtext}\n{report.capstdout[-3000:]}\n{report.capstderr[-3000:]}"
            self._terminal.write(f"\n>>> {report.nodeid} ({report.when})\n{text}\n<<<\n")
        elif report.duration > SLOW_S:
            self._terminal.write(f"({report.when} {report.duration:.0f} s) ")

    def pytest_sessionfinish(self) -> None:
        up_s, idle_s = Path("/proc/uptime").read_text().split()
        self._terminal.write(f"\nthe machine is up for {up_s} s and was idle for {idle_s} s of them\n")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    assert isinstance(terminal, pytest.TerminalReporter)
    config.pluginmanager.register(Telling(terminal))
