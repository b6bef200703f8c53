"""Revoked at once: with the real Mosquitto, the box's connection ends, nothing of it is taken, and no restart lets it in."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_hub import cutoff, registry
from cloud_hub.cutoff import CutOff
from cloud_hub.database import Device
from tests.cloud_hub.box_twin import BoxTwin
from tests.cloud_hub.hub_support import await_true, needs_mosquitto
from tests.cloud_hub.round_support import needs_bundle
from tests.cloud_hub.test_broker import NO_SUBSCRIBERS, Running
from tests.cloud_hub.test_service import HubProcess

pytestmark = [needs_mosquitto, pytest.mark.slow]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    hub = Running(tmp_path)
    yield hub
    hub.close()


def revoke(running: Running, device: str) -> CutOff:
    """As the hub does at `fleet device revoke`."""
    ordered_at = time.monotonic()
    with running.hub.database.writing() as session:
        registry.revoke(session, device, now=time.time())
    running.broker.reload()
    return cutoff.cut_off(running.hub.config, running.hub.authority, device, ordered_at=ordered_at)


def test_a_connected_box_is_off_when_it_is_said_and_the_others_are_not(running: Running) -> None:
    files = running.hub.device_files(running.folder, "box-a")
    box, other = running.connect(*files), running.device("box-b")
    await_true(lambda: box.connected)
    shown = revoke(running, "box-a")
    assert (shown.was_connected, shown.refuses) == (True, True)
    assert "box-a already connected, closing old connection" in shown.broker_said[0]
    await_true(lambda: box.disconnects > 0)
    running.await_refused("certificate verify failed")  # it tries to come back
    assert not box.connected
    assert (other.disconnects, other.publish("wr1/up/box-b/msg")) == (0, NO_SUBSCRIBERS)


def test_a_box_that_is_away_is_refused_all_the_same(running: Running) -> None:
    shown = revoke(running, "box-a")
    assert (shown.was_connected, shown.refuses, shown.broker_said) == (False, True, ())


def test_what_the_broker_still_takes_is_not_called_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutoff, "GIVE_UP_S", 0.3)
    box = running.device("box-a")
    shown = cutoff.cut_off(running.hub.config, running.hub.authority, "box-a", ordered_at=time.monotonic())
    assert (shown.was_connected, shown.refuses) == (True, False)
    assert shown.after_ms >= 300.0
    await_true(lambda: box.connected)


def test_without_a_broker_nothing_is_proved(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutoff, "GIVE_UP_S", 0.3)
    running.broker.stop()
    shown = cutoff.cut_off(running.hub.config, running.hub.authority, "box-a", ordered_at=time.monotonic())
    assert (shown.was_connected, shown.refuses) == (False, False)


def fleet(hub: HubProcess, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from cloud_hub.fleet_cli import main; main()"]
    config = str(hub.config.paths.data_dir / "fleet.toml")
    return subprocess.run([*command, "--config", config, *arguments], capture_output=True, text=True, check=False)


@needs_bundle
def test_the_operators_command_cuts_a_box_off_for_good(tmp_path: Path) -> None:
    hub = HubProcess(tmp_path)
    try:
        hub.start()
        a, b = hub.add_box("a"), hub.add_box("b")
        hub.api("POST", "/devices", {"device": "c", "site": "north"})  # the access list is written anew, with a and b
        hub.until(lambda: heard(hub, a) and heard(hub, b))
        done = fleet(hub, "device", "revoke", "a", "--yes", "--json")
        shown = json.loads(done.stdout)
        assert (done.returncode, shown["state"]) == (0, "revoked")
        assert shown["cut_off"]["was_connected"]
        assert shown["cut_off"]["refuses"]
        await_true(lambda: not a.bus.connected)
        seen = last_seen(hub, "a")
        again = fleet(hub, "device", "revoke", "a", "--yes")
        assert again.returncode == 0
        assert "it had none" in again.stdout
        assert "not authorised" in again.stdout
        hub.kill()
        hub.start()
        before = last_seen(hub, "b")
        hub.until(lambda: heard(hub, b) != before)
        assert not heard(hub, a) > (seen or 0.0)
        assert not a.bus.connected
        assert last_seen(hub, "a") == seen
    finally:
        hub.close()


def heard(hub: HubProcess, box: BoxTwin) -> float:
    """Let it report in; gives when the hub heard it last, 0 for never."""
    box.heartbeat()
    return last_seen(hub, box.name) or 0.0


def last_seen(hub: HubProcess, device: str) -> float | None:
    with hub.files.database.reading() as session:
        return session.get_one(Device, device).last_seen_at
