"""Both services under systemd: the units are sound, and what systemd is told is what happens."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.house import House
from benchmarks.processes import BIN, Daemon

ROOT = Path(__file__).resolve().parents[1]
UNITS = sorted((ROOT / "packaging").glob("*.service"))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_is_sound(unit: Path, tmp_path: Path) -> None:
    installed = tmp_path / unit.name  # as it will be once the commands lie in /usr/bin
    installed.write_text(re.sub(r"/usr/bin/(edge-agent|hub)\b", rf"{BIN}/\1", unit.read_text()))
    done = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_units_run_commands_that_exist() -> None:
    assert [unit.stem for unit in UNITS] == ["wardround-edge-key", "wardround-edge", "wardround-hub"]
    for unit in UNITS:
        command, *arguments = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)[0].split()
        if unit.stem == "wardround-edge-key":  # systemd's own and the system's
            continue
        shown = subprocess.run(
            [BIN / Path(command).name, arguments[0], "--help"], capture_output=True, text=True, check=True
        )
        assert all(word in shown.stdout for word in arguments if word.startswith("--"))


@pytest.fixture
def systemd_socket(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60.0)
        yield listening


@pytest.mark.slow
def test_box_reports_ready_alive_and_stopping(tmp_path: Path, systemd_socket: socket.socket) -> None:
    with House(tmp_path / "house") as house:
        box = house.add_box("north-1", "north", {"hub.enabled": False, "pacs.enabled": False})
        told = _run_under(box.daemon, systemd_socket, tmp_path)
        box.wait_ready()
        assert next(told).startswith("READY=1\nSTATUS=receiving as NORTH_1")
        assert next(told) == "WATCHDOG=1"
        box.daemon.terminate()
        assert "STOPPING=1" in list(_until(told, "STOPPING=1"))


@pytest.mark.slow
def test_hub_reports_ready_alive_and_stopping(tmp_path: Path, systemd_socket: socket.socket) -> None:
    with House(tmp_path / "house") as house:
        house.hub.init()
        told = _run_under(house.hub.daemon, systemd_socket, tmp_path)
        house.hub.wait_ready()
        assert next(told).startswith("READY=1\nSTATUS=https://localhost:")
        assert next(told) == "WATCHDOG=1"
        house.hub.daemon.terminate()
        assert "STOPPING=1" in list(_until(told, "STOPPING=1"))


def _run_under(daemon: Daemon, listening: socket.socket, tmp_path: Path) -> Iterator[str]:
    daemon.start({**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"})
    return iter(lambda: listening.recv(4096).decode(), "")


def _until(told: Iterator[str], last: str) -> Iterator[str]:
    for text in told:
        yield text
        if text == last:
            return
