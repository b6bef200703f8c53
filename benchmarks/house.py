"""The whole house on loopback: a hub, boxes and a PACS, each its own process in one work folder.

Starts the installed commands (`hub`, `fleet`, `edge-agent`, DCMTK's `storescu`) as a site would; reads their JSON and databases.
Never reaches into a running process: whoever uses it may kill -9 any of them.
"""

import json
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.orthanc import Orthanc
from benchmarks.processes import BIN, Daemon, HouseError, free_port, port_open, wait_for


def run_command(*command: str, stdin: str | None = None, timeout_s: float = 120.0) -> str:
    """Standard output of one of our commands. Raises HouseError with its messages if it fails."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise HouseError(f"`{' '.join(command[:3])} …` exited with {done.returncode}:\n{done.stderr or done.stdout}")
    return done.stdout


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
        return port_open(self.dicom_port) and port_open(self.review_port)

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
        return port_open(self.https_port) and port_open(self.mqtt_port)

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
        if isinstance(value, HouseError):
            value.add_note(self.account())
        self.stop()

    def must_run(self) -> None:
        """Raises HouseError, with its last words, when the hub or a box has ended by itself."""
        for daemon in (self.hub.daemon, *(box.daemon for box in self.boxes)):
            daemon.must_run()

    def account(self) -> str:
        """Whether each process runs, and the last lines of its log: what somebody who was not there needs."""
        parts = {"hub": self.hub.daemon, **{box.name: box.daemon for box in self.boxes}}
        return "\n".join(
            f"--- {name} {'runs' if daemon.running else 'does not run'}; last lines of {daemon.log_path}:\n{daemon.tail(12)}"
            for name, daemon in parts.items()
        )

    def stop(self) -> None:
        for box in self.boxes:
            if box.daemon.running:
                box.daemon.terminate()  # all at once; each is waited for below
        for box in self.boxes:
            box.daemon.stop()
        self.hub.daemon.stop()
        if self.pacs.running:
            self.pacs.kill()  # told to end it takes 8 s, and nothing of it is kept

    def add_box(self, name: str, site: str, settings: dict[str, object] | None = None) -> Box:
        """Make the box's configuration, pointed at this house's PACS and hub."""
        box = Box(name, site, self.folder / name)
        pacs = {"pacs.host": "127.0.0.1", "pacs.port": self.pacs.dicom_port, "pacs.ae_title": self.pacs.ae_title}
        box.init({**pacs, "pacs.enabled": True, **(settings or {})})
        self.boxes.append(box)
        return box

    def open_hub(self, *sites: str) -> None:
        """A new hub that knows these sites, running."""
        self.hub.init()
        self.hub.start()
        self.hub.wait_ready()
        for site in sites:
            self.hub.fleet("site", "add", site)

    def enroll(self, box: Box) -> None:
        box.enroll(self.hub.fleet("device", "add", box.name, "--site", box.site)["token"])


def send_dicom(box: Box, files: Sequence[Path]) -> None:
    """One association with DCMTK's storescu, as a scanner would. Raises HouseError if any instance was refused."""
    storescu(box.dicom_port, box.ae_title, files)


def storescu(port: int, called_ae: str, files: Sequence[Path]) -> None:
    command = ["storescu", "-aet", "SCANNER", "-aec", called_ae, "127.0.0.1", str(port)]
    done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise HouseError(f"storescu to {called_ae} exited with {done.returncode}:\n{done.stderr[-2000:]}")


def send_folder(box: Box, folder: Path) -> dict[str, int]:
    """Every file below `folder` with DCMTK's dcmsend, each in an association and transfer syntax of its own.

    Gives how many were sent, and how many were not for which reason: one broken file stops no other.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:
        return dict(Counter(pool.map(lambda path: _send_file(box, path), files)))


def _send_file(box: Box, path: Path) -> str:
    command = ["dcmsend", "-aet", "SCANNER", "-aec", box.ae_title, "-dn", "127.0.0.1", str(box.dicom_port), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == 0:
        return "sent"
    complaints = [line for line in done.stderr.splitlines() if line[:2] in ("E:", "F:", "W:")]
    return "not sent: " + (complaints[0][2:].replace(str(path), "").strip(" :") if complaints else "no reason given")
