"""The whole house on loopback: a hub, boxes and a PACS, each its own process in one work folder.

Starts the installed commands (`hub`, `fleet`, `edge-agent`, DCMTK's `storescu`) as a site would; reads their JSON and databases.
Never reaches into a running process: whoever uses it may kill -9 any of them.
"""

import ctypes
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from benchmarks.orthanc import Orthanc

_BIN = Path(sys.executable).parent
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class HouseError(RuntimeError):
    """Something did not start or did not happen in time; the text ends with the log's last lines."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(what: str, probe: Callable[[], T], *, timeout_s: float, every_s: float = 0.1) -> T:
    """The first truthy value `probe` gives. Raises HouseError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise HouseError(f"no {what} within {timeout_s:.0f} s")
        time.sleep(every_s)
    return value


def run_command(*command: str, stdin: str | None = None, timeout_s: float = 120.0) -> str:
    """Standard output of one of our commands. Raises HouseError with its messages if it fails."""
    done = subprocess.run(
        [str(_BIN / command[0]), *command[1:]],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise HouseError(f"`{' '.join(command[:3])} …` exited with {done.returncode}:\n{done.stderr or done.stdout}")
    return done.stdout


class Daemon:
    """One long-running command with its log file; ends with this process whatever happens."""

    def __init__(self, command: Sequence[str], log_path: Path) -> None:
        self.command = [str(_BIN / command[0]) if (_BIN / command[0]).exists() else command[0], *command[1:]]
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
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


class Box:
    """One edge box: configuration, daemon, and what its database says."""

    def __init__(self, name: str, site: str, folder: Path) -> None:
        self.name = name
        self.site = site
        self.folder = folder
        self.config_path = folder / "edge-agent.toml"
        self.data_dir = folder / "data"
        self.ae_title = name.upper().replace("-", "_")[:16]
        self.dicom_port = free_port()
        self.review_port = free_port()
        self.daemon = Daemon(["edge-agent", "run", "--config", str(self.config_path)], folder / "edge-agent.log")

    @property
    def review_url(self) -> str:
        return f"http://127.0.0.1:{self.review_port}"

    def init(self, settings: dict[str, object]) -> None:
        self.folder.mkdir(parents=True)
        own: dict[str, object] = {
            "box.data_dir": str(self.data_dir),
            "box.site": self.site,
            "dicom.ae_title": self.ae_title,
            "dicom.bind": "127.0.0.1",
            "dicom.port": self.dicom_port,
            "review.port": self.review_port,
        }
        options = [
            word for key, value in {**own, **settings}.items() for word in ("--set", f"{key}={json.dumps(value)}")
        ]
        run_command("edge-agent", "init", "--config", str(self.config_path), *options)

    def enroll(self, token: str) -> None:
        run_command("edge-agent", "enroll", token, "--config", str(self.config_path))

    def add_user(self, name: str, password: str) -> None:
        run_command(
            "edge-agent",
            "user",
            "add",
            name,
            "--password-stdin",
            "--config",
            str(self.config_path),
            stdin=password + "\n",
        )

    def start(self) -> None:
        self.daemon.start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        wait_for(f"answer from {self.name}", self._answers, timeout_s=timeout_s)

    @property
    def listening(self) -> bool:
        return _port_open(self.dicom_port) and _port_open(self.review_port)

    def _answers(self) -> bool:
        self.daemon.must_run()
        return self.listening

    def query(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """Rows of box.db, read beside the running daemon."""
        if not (self.data_dir / "box.db").exists():
            return []
        db = sqlite3.connect(f"file:{self.data_dir / 'box.db'}?mode=ro", uri=True, timeout=30.0)
        db.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in db.execute(sql, values)]
        finally:
            db.close()

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(
            run_command("edge-agent", "status", "--json", "--config", str(self.config_path))
        )
        return status


class Hub:
    """The hub, its Mosquitto child, and what `fleet` says of it."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder
        self.mqtt_port = free_port()
        self.https_port = free_port()
        self.daemon = Daemon(["hub", "run", "--config", str(folder / "hub.toml")], folder.with_suffix(".log"))

    @property
    def url(self) -> str:
        return f"https://localhost:{self.https_port}"

    @property
    def admin_token(self) -> str:
        return (self.data_dir / "admin.token").read_text().strip()

    def init(self, *options: str) -> None:
        ports = ["--mqtt-port", str(self.mqtt_port), "--https-port", str(self.https_port)]
        run_command(
            "hub",
            "init",
            "--data-dir",
            str(self.data_dir),
            "--host",
            "localhost",
            "--bind",
            "127.0.0.1",
            *ports,
            *options,
        )

    def start(self) -> None:
        self.daemon.start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        wait_for("answer from the hub", self._answers, timeout_s=timeout_s)

    @property
    def listening(self) -> bool:
        return _port_open(self.https_port) and _port_open(self.mqtt_port)

    def _answers(self) -> bool:
        self.daemon.must_run()
        return self.listening

    def fleet(self, *command: str) -> Any:
        """What `fleet … --json` prints, parsed."""
        return json.loads(run_command("fleet", "--config", str(self.data_dir / "fleet.toml"), *command, "--json"))


class House:
    """`with House(folder) as house:` stops everything on the way out, however that comes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.hub = Hub(folder / "hub")
        self.pacs = Orthanc(folder / "pacs")
        self.boxes: list[Box] = []

    def __enter__(self) -> "House":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        for box in self.boxes:
            if box.daemon.running:
                os.kill(box.daemon.pid, signal.SIGTERM)  # all at once; each is waited for below
        for box in self.boxes:
            box.daemon.stop()
        self.hub.daemon.stop()
        self.pacs.stop()

    def add_box(self, name: str, site: str, settings: dict[str, object] | None = None) -> Box:
        """Make the box's configuration, pointed at this house's PACS and hub."""
        box = Box(name, site, self.folder / name)
        pacs = {"pacs.host": "127.0.0.1", "pacs.port": self.pacs.dicom_port, "pacs.ae_title": self.pacs.ae_title}
        box.init({**pacs, "pacs.enabled": True, **(settings or {})})
        self.boxes.append(box)
        return box


def send_dicom(box: Box, files: Sequence[Path]) -> None:
    """One association with DCMTK's storescu, as a scanner would. Raises HouseError if any instance was refused."""
    command = ["storescu", "-aet", "SCANNER", "-aec", box.ae_title, "127.0.0.1", str(box.dicom_port)]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise HouseError(f"storescu to {box.name} exited with {done.returncode}:\n{done.stderr[-2000:]}")


def send_folder(box: Box, folder: Path) -> str:
    """Every DICOM file below `folder` in its own transfer syntax, with DCMTK's dcmsend; gives its summary.

    What is no DICOM file is passed over; what the box refuses is in the summary.
    """
    command = ["dcmsend", "-v", "-aet", "SCANNER", "-aec", box.ae_title, "127.0.0.1", str(box.dicom_port)]
    options = ["+sd", "+r", "-nh", "-dn"]
    done = subprocess.run([*command, *options, str(folder)], capture_output=True, text=True, timeout=3600, check=False)
    return done.stdout + done.stderr


def _port_open(port: int) -> bool:
    with socket.socket() as sock:
        sock.settimeout(1.0)
        return sock.connect_ex(("127.0.0.1", port)) == 0


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
