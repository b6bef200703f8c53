"""`hub run` as a process: starts, stops, is killed at every hand-over of a round, and ends the round all the same."""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.processes import free_port
from cloud_hub import ca, database, setup
from cloud_hub.releases import Repository
from fleet_link.bus import BusConfig
from fleet_link.messages import Receipt, ReleaseOffer, RoundClosed, RoundPlan
from fleet_link.pki import Trust, load_identity
from models.bundle import SHIPPED, file_digest
from tests.cloud_hub.box_twin import BoxTwin, until
from tests.cloud_hub.hub_support import HubFiles, needs_mosquitto
from tests.cloud_hub.round_support import Box, needs_bundle
from tests.cloud_hub.test_releases import another_bundle

pytestmark = [needs_bundle, needs_mosquitto, pytest.mark.slow]


class HubProcess:
    """A hub made by `hub init`'s code and run by `hub run`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        wish = setup.Wish(folder / "hub", "localhost", free_port(), free_port(), "127.0.0.1", SHIPPED)
        self.config = setup.initialise(wish, now=time.time())
        paths = self.config.paths
        self.files = HubFiles(
            self.config,
            database.connect(paths.database),
            ca.load(paths.ca_key, paths.ca_certificate, self.config.ca_passphrase),
        )
        self.child: subprocess.Popen[bytes] | None = None
        self.boxes: list[BoxTwin] = []

    def start(self, **environment: str) -> None:
        self.child = self.spawn(**environment)
        until(self.answers, lambda: time.sleep(0.05))

    def spawn(self, **environment: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", "from cloud_hub.cli import main; main()", "run", "--config"]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*command, str(self.folder / "hub" / "hub.toml")], stdout=log, stderr=log, env=os.environ | environment
            )

    def answers(self) -> bool:
        assert self.child is not None
        assert self.child.poll() is None, self.log()
        try:
            return bool(self.api("GET", "/status")["broker_running"])
        except httpx.TransportError:
            return False

    def api(self, method: str, path: str, body: object = None) -> dict[str, object]:
        token = self.config.paths.admin_token.read_text().strip()
        trust = ssl.create_default_context(cafile=str(self.config.paths.ca_certificate))
        with httpx.Client(verify=trust, headers={"Authorization": f"Bearer {token}"}) as client:
            answer = client.request(method, f"{self.config.url}/api/v1{path}", json=body)
        assert answer.status_code < 300, answer.text
        return dict(answer.json())

    def kill(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.wait()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def add_box(self, name: str) -> BoxTwin:
        self.files.add_device(name)
        certificate, key = self.files.device_files(self.folder, name)
        paths = self.config.paths
        bus = BusConfig("localhost", self.config.broker.port, name, paths.ca_certificate, certificate, key)
        trust = Trust(paths.ca_certificate.read_bytes())
        box = BoxTwin(load_identity(key, certificate), bus, trust, self.folder, file_digest(SHIPPED))
        self.boxes.append(box)
        return box

    def step_boxes(self) -> None:
        for box in self.boxes:
            box.step()
        time.sleep(0.02)

    def until(self, condition: object) -> None:
        until(condition, self.step_boxes, within_s=120.0)  # type: ignore[arg-type]

    def close(self) -> None:
        for box in self.boxes:
            box.close()
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.files.database.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubProcess]:
    made = HubProcess(tmp_path)
    yield made
    made.close()


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. A dead orphan stays a zombie where PID 1 does not reap, as in many containers."""
    return [process for process in processes if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_sigterm_ends_everything_cleanly(hub: HubProcess) -> None:
    hub.start()
    assert hub.child is not None
    left = children(hub.child.pid)
    assert any("mosquitto" in process.name() for process in left)
    hub.child.send_signal(signal.SIGTERM)
    assert hub.child.wait(30) == 0
    assert not running(left)
    assert is_free(hub.config.broker.port)
    assert is_free(hub.config.https.port)
    assert "Traceback" not in hub.log()


def test_second_hub_on_the_same_folder_is_refused(hub: HubProcess) -> None:
    hub.start()
    second = hub.spawn()
    assert second.wait(60) == 3
    assert "a hub runs on" in hub.log()
    assert hub.answers()


def test_taken_port_is_named_and_nothing_is_left_behind(hub: HubProcess) -> None:
    with socket.create_server(("127.0.0.1", hub.config.https.port)):
        assert hub.spawn().wait(60) == 3
    assert f"https.port {hub.config.https.port}" in hub.log()
    assert is_free(hub.config.broker.port)


def test_killed_broker_comes_back(hub: HubProcess) -> None:
    hub.start()
    assert hub.child is not None
    box = hub.add_box("a")
    hub.files.write_access()
    (broker,) = [process for process in children(hub.child.pid) if "mosquitto" in process.name()]
    broker.kill()
    hub.until(lambda: box.bus.connected)
    beat(hub, box)


def test_trouble_that_lasts_in_the_rounds_holds_up_neither_broker_nor_link_nor_watchdog(
    hub: HubProcess, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        hub.start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="1000000")
        box = hub.add_box("a")
        hub.files.write_access()
        timestamp = hub.config.paths.releases / "timestamp.json"
        timestamp.rename(tmp_path / "timestamp.json")
        round_id = start_round(hub, min_devices=1)
        with hub.files.database.writing() as session:  # what was its candidate cannot be published now
            row = session.get_one(database.Round, round_id)
            row.state, row.candidate_digest = "evaluated", "f" * 64
        trouble = "releases/timestamp.json cannot be read"
        hub.until(lambda: trouble in hub.log())
        assert hub.child is not None
        (broker,) = [process for process in children(hub.child.pid) if "mosquitto" in process.name()]
        broker.kill()
        hub.until(lambda: box.bus.connected)
        beat(hub, box)
        systemd.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while systemd.recv(1000):  # what was said before
                pass
        systemd.settimeout(60.0)
        assert systemd.recv(1000) == b"WATCHDOG=1"
    assert hub.log().count(trouble) <= 2  # by the rounds; and by the refresh, if its first turn came this late
    (tmp_path / "timestamp.json").rename(timestamp)
    hub.until(lambda: round_state(hub) == "dropped")


def test_hub_restored_from_a_backup_made_as_the_readme_says_runs_and_knows_what_was_released_meanwhile(
    hub: HubProcess, tmp_path: Path
) -> None:
    hub.start()
    data_dir, backup = hub.config.paths.data_dir, tmp_path / "backup"
    backup.mkdir()
    with (
        contextlib.closing(sqlite3.connect(hub.config.paths.database)) as running,
        contextlib.closing(sqlite3.connect(backup / "hub.db")) as copy,
    ):
        running.backup(copy)
    hub.kill()
    candidate = another_bundle(tmp_path / "candidate.bundle", "later")  # released between the two halves of the backup
    Repository(hub.config.paths).publish(candidate, round_id="r0001-5d0c3f2a", now=time.time())
    for name in ("ca", "keys", "releases"):
        shutil.copytree(data_dir / name, backup / name)
    for name in ("hub.toml", "fleet.toml", "admin.token", "ca.passphrase"):
        shutil.copy2(data_dir / name, backup / name)
    hub.files.database.close()
    shutil.rmtree(data_dir)
    shutil.copytree(backup, data_dir)
    hub.start()
    releases = hub.api("GET", "/releases")["releases"]
    assert isinstance(releases, list)
    assert [(row["release_version"], row["round_id"]) for row in releases] == [(2, None), (1, None)]
    box = hub.add_box("a")
    hub.files.write_access()
    assert hub.child is not None
    (broker,) = [process for process in children(hub.child.pid) if "mosquitto" in process.name()]
    broker.send_signal(signal.SIGHUP)
    beat(hub, box)


def test_hub_killed_at_every_hand_over_ends_the_round_as_if_nothing_had_happened(hub: HubProcess) -> None:
    hub.start()
    a, b = hub.add_box("a"), hub.add_box("b")
    hub.files.write_access()
    assert hub.child is not None
    for process in children(hub.child.pid):
        if "mosquitto" in process.name():
            process.send_signal(signal.SIGHUP)
    for box in hub.boxes:
        beat(hub, box)
    round_id = start_round(hub)

    restart(hub)  # invited
    hub.until(lambda: all(box.of(RoundPlan) for box in hub.boxes))
    for box in hub.boxes:
        box.answer(round_id)
    hub.until(lambda: all(box.of(Receipt) for box in hub.boxes))

    restart(hub)  # training
    plan = a.of(RoundPlan)[0]
    transfer = a.upload(round_id, Box("a", a.identity).seal(plan, 0.01))
    hub.until(lambda: a.verdicts(transfer))

    restart(hub)  # uploading
    transfer = b.upload(round_id, Box("b", b.identity).seal(plan, 0.03))
    hub.until(lambda: b.verdicts(transfer))
    hub.until(lambda: exports(hub))

    export = exports(hub)
    restart(hub)  # summed, an export was running
    assert not running(export)
    hub.until(lambda: round_state(hub) in ("evaluated", "released"))

    restart(hub)  # evaluated or released
    hub.until(lambda: round_state(hub) == "released")
    for box in hub.boxes:
        box.round_state[round_id] = "delivered"
        box.heartbeat()
    hub.until(lambda: all(box.of(RoundClosed) for box in hub.boxes) and a.of(ReleaseOffer))
    a.request(a.of(ReleaseOffer)[0].bundle_digest)

    restart(hub)  # the bundle is on its way
    a.heartbeat()
    hub.until(lambda: len(a.of(ReleaseOffer)) > 1)
    a.request(a.of(ReleaseOffer)[0].bundle_digest)
    hub.until(lambda: a.bundles)
    releases = hub.api("GET", "/releases")["releases"]
    assert isinstance(releases, list)
    assert [(row["release_version"], row["round_id"]) for row in releases] == [(2, round_id), (1, None)]
    assert file_digest(a.bundles[0]) == releases[0]["bundle_digest"]
    assert list(hub.config.paths.rounds.iterdir()) == []
    assert "defect" not in hub.log()


def exports(hub: HubProcess) -> list[psutil.Process]:
    assert hub.child is not None
    return [process for process in children(hub.child.pid) if "models.export" in " ".join(process.cmdline())]


def restart(hub: HubProcess) -> None:
    hub.kill()
    hub.start()
    for box in hub.boxes:
        beat(hub, box)


def beat(hub: HubProcess, box: BoxTwin) -> None:
    """Heartbeats, as often as it takes: what is said while the other side is away is lost."""
    before = device(hub, box.name)["last_seen_at"]

    def seen() -> bool:
        box.heartbeat()
        return device(hub, box.name)["last_seen_at"] != before

    hub.until(seen)


def device(hub: HubProcess, name: str) -> dict[str, object]:
    return hub.api("GET", f"/devices/{name}")


def start_round(hub: HubProcess, *, min_devices: int = 2) -> str:
    wish: dict[str, object] = {"kind": "unsafe_open", "trainable": "heads", "min_examples": 1, "deadline_s": 3600.0}
    wish["min_devices"] = min_devices
    return str(hub.api("POST", "/rounds", wish)["round_id"])


def round_state(hub: HubProcess) -> object:
    rows = hub.api("GET", "/rounds")["rounds"]
    assert isinstance(rows, list)
    return rows[0]["state"]
