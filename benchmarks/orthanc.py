"""A real Orthanc as the PACS: its own folder, free ports, no login unless asked for; stops when told.

Starts Debian's `Orthanc`; asks its REST interface.
Never reads or writes outside its folder and never listens beyond loopback for HTTP.
Source: Orthanc Book, "Configuration" and "REST API".
"""

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

_CANDIDATES = ("Orthanc", "/usr/sbin/Orthanc")
_START_TIMEOUT_S = 60.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class OrthancError(RuntimeError):
    """Orthanc is not installed, did not start or did not answer; the text ends with its log's last lines."""


def binary() -> str | None:
    """Where Debian's `orthanc` package put it; None if it is not installed."""
    return next((found for name in _CANDIDATES if (found := shutil.which(name))), None)


class Orthanc:
    """start() and stop() may be called again and again: ports and stored objects stay. Also a `with` block."""

    ae_title = "ORTHANC"

    def __init__(self, folder: Path, *, login: tuple[str, str] | None = None, **settings: object) -> None:
        self.folder = folder
        self.login = login
        self.dicom_port = _free_port()
        self.http_port = _free_port()
        self._settings = settings  # further keys of Orthanc's configuration, e.g. DicomCheckCalledAet=True
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> "Orthanc":
        self.start()
        self.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Raises OrthancError when it is not installed."""
        command = binary()
        if command is None:
            raise OrthancError("Orthanc is not installed: apt-get install orthanc")
        storage = self.folder / "storage"
        storage.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "orthanc.json"
        configuration.write_text(json.dumps(self._configuration(storage), indent=1), "utf-8")
        with (self.folder / "orthanc.log").open("ab") as log:
            self._process = subprocess.Popen(
                [command, str(configuration)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def wait_ready(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Until both doors answer. Raises OrthancError if they do not."""
        deadline = time.monotonic() + timeout_s
        while not self._is_ready():
            if not self.running or time.monotonic() > deadline:
                raise OrthancError(f"Orthanc did not start:\n{self.tail()}")
            time.sleep(0.05)

    def stop(self, timeout_s: float = 15.0) -> None:
        if self._process is None:
            return
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """kill -9, as a power cut would."""
        assert self._process is not None, "not started"
        self._process.kill()
        self._process.wait()

    def tail(self, lines: int = 25) -> str:
        path = self.folder / "orthanc.log"
        return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:]) if path.exists() else ""

    def count_instances(self) -> int:
        return int(self.get("/statistics")["CountInstances"])

    def instances(self) -> list[dict[str, str]]:
        """The short tags of every stored object, as keyword -> value."""
        return [self.get(f"/instances/{name}/simplified-tags") for name in self.get("/instances")]

    def files(self) -> list[bytes]:
        """Every stored object as a DICOM file."""
        return [self._request(f"/instances/{name}/file").content for name in self.get("/instances")]

    def get(self, path: str) -> Any:
        return self._request(path).json()

    def _request(self, path: str) -> httpx.Response:
        answer = httpx.get(self.http_url + path, auth=self.login, timeout=30.0)
        answer.raise_for_status()
        return answer

    def _is_ready(self) -> bool:
        try:
            self.get("/system")
            with socket.create_connection(("127.0.0.1", self.dicom_port), timeout=1.0):
                return True
        except (httpx.HTTPError, OSError):
            return False

    def _configuration(self, storage: Path) -> dict[str, object]:
        return {
            "Name": "Wardround PACS",
            "StorageDirectory": str(storage),
            "IndexDirectory": str(storage),
            "Plugins": [],
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": self.login is not None,
            "RegisteredUsers": dict([self.login]) if self.login else {},
            "DicomAet": self.ae_title,
            "DicomPort": self.dicom_port,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowEcho": True,
            "OverwriteInstances": True,
            **self._settings,
        }


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _die_with_parent() -> None:
    """In the child: the kernel ends it when its parent is gone. Source: prctl(2)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
