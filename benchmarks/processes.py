"""Long-running processes of a house: started with a log of their own, killed as a power cut would, never left behind.

Starts and ends processes; reads proc(5).
Never outlives the thread that started it.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

BIN = Path(sys.executable).parent
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class HouseError(RuntimeError):
    """Something did not start or did not happen in time; the text ends with the log's last lines."""


def free_port() -> int:
    """To listen on. Below what the system gives to outgoing connections: nobody takes it before it is used."""
    for _ in range(100):
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise HouseError("no free port from 20000 to 32000")


def port_open(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1.0)
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_for(what: str, probe: Callable[[], T], *, timeout_s: float, every_s: float = 0.1) -> T:
    """The first truthy value `probe` gives. Raises HouseError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise HouseError(f"no {what} within {timeout_s:.0f} s")
        time.sleep(every_s)
    return value


class Daemon:
    """One long-running command with its log file; ends with this process whatever happens."""

    def __init__(self, command: Sequence[str], log_path: Path) -> None:
        self.command = [str(BIN / command[0]) if (BIN / command[0]).exists() else command[0], *command[1:]]
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                env=environment,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def must_run(self) -> None:
        if not self.running:
            raise HouseError(f"{Path(self.command[0]).name} has stopped:\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        text = self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        assert self._process is not None
        self._process.terminate()

    def kill(self) -> None:
        """kill -9 of the process alone, as a power cut or the out-of-memory killer would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def wait_end(self, timeout_s: float) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self, timeout_s: float = 20.0) -> None:
        """SIGTERM, then SIGKILL for what is left of its session."""
        if self._process is None:
            return
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        _kill_session(self._process.pid)

    def peak_memory_bytes(self) -> int:
        """VmHWM of proc(5); 0 once the process is gone."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_session(session: int) -> None:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            os.kill(int(stat.parent.name), signal.SIGKILL)
