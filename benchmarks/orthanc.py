"""A real Orthanc as the PACS: its own folder, free ports, no login unless asked for; stops when told.

Starts Debian's `Orthanc`; asks its REST interface.
Never reads or writes outside its folder and never listens beyond loopback for HTTP.
Source: Orthanc Book, "Configuration" and "REST API".
"""

import json
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from benchmarks.processes import Daemon, HouseError, free_port, port_open

_CANDIDATES = ("Orthanc", "/usr/sbin/Orthanc")
_START_TIMEOUT_S = 60.0


def binary() -> str | None:
    """Where Debian's `orthanc` package put it; None if it is not installed."""
    return next((found for name in _CANDIDATES if (found := shutil.which(name))), None)


class Orthanc:
    """start() and stop() may be called again and again: ports and stored objects stay. Also a `with` block."""

    ae_title = "ORTHANC"

    def __init__(self, folder: Path, *, login: tuple[str, str] | None = None, **settings: object) -> None:
        self.folder = folder
        self.login = login
        self.dicom_port = free_port()
        self.http_port = free_port()
        self._settings = settings  # further keys of Orthanc's configuration, e.g. DicomCheckCalledAet=True
        self._daemon = Daemon([binary() or "Orthanc", str(folder / "orthanc.json")], folder / "orthanc.log")

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def running(self) -> bool:
        return self._daemon.running

    def __enter__(self) -> "Orthanc":
        self.start()
        self.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Raises HouseError when it is not installed."""
        if binary() is None:
            raise HouseError("Orthanc is not installed: apt-get install orthanc")
        storage = self.folder / "storage"
        storage.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "orthanc.json"
        configuration.write_text(json.dumps(self._configuration(storage), indent=1), "utf-8")
        self._daemon.start()

    def wait_ready(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Until both doors answer. Raises HouseError if they do not."""
        deadline = time.monotonic() + timeout_s
        while not self._is_ready():
            if not self.running or time.monotonic() > deadline:
                raise HouseError(f"Orthanc did not start:\n{self._daemon.tail()}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._daemon.stop()

    def kill(self) -> None:
        self._daemon.kill()

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
        except httpx.HTTPError:
            return False
        return port_open(self.dicom_port)

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
