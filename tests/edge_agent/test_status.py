"""What `status` and `doctor` say of a certificate near its end, and where the hub is by the site's own word."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent import cli, doctor, identity, status
from edge_agent.doctor import Level
from fleet_link.errors import SiteError
from tests.edge_agent.link_support import DEVICE, Box, make_box
from tests.fleet_link.mosquitto_support import TestAuthority, write_identity

AUTHORITY = TestAuthority()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = make_box(tmp_path, AUTHORITY)
    yield made
    made.db.close()


def certify(box: Box, *, days: float) -> None:
    """A certificate that ends in so many days."""
    here = identity.folder(box.data_dir)
    write_identity(here.path, AUTHORITY.issue(DEVICE, from_days=-100, to_days=days))
    (here.path / f"{DEVICE}.pem").replace(here.certificate)
    (here.path / f"{DEVICE}.key").replace(here.key)


@pytest.mark.parametrize(
    ("days", "left", "level", "alarm"),
    [
        (60.5, 60, Level.OK, ""),
        (30.5, 30, Level.OK, ""),
        (12.5, 12, Level.WARNING, "the certificate ends in 12 days"),
        (-0.5, -1, Level.ERROR, "the certificate has expired"),
    ],
)
def test_a_certificate_near_its_end(box: Box, days: float, left: int, level: Level, alarm: str) -> None:
    certify(box, days=days)
    gathered = status.gather(box.config)
    assert (gathered.device, gathered.certificate_days_left) == (DEVICE, left)
    assert [text.partition(":")[0] for text in gathered.notices] == ([alarm] if alarm else [])
    check = next(check for check in doctor.examine(box.config) if check.name == "identity")
    assert check.level is level
    assert ("enroll --replace" in check.advice) is (level is not Level.OK)


def test_status_prints_it(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    certify(box, days=12.5)
    cli._print_status(status.gather(box.config))
    said = capsys.readouterr().out
    assert "notice: the certificate ends in 12 days" in said
    assert "certificate: 12 days left" in said


def test_before_enrolment_there_is_no_certificate(box: Box) -> None:
    identity.folder(box.data_dir).certificate.unlink()
    gathered = status.gather(box.config)
    assert (gathered.device, gathered.certificate_days_left, gathered.notices) == ("", None, [])


def test_no_identity_is_replaced_under_a_running_agent(box: Box, tmp_path: Path) -> None:
    path = tmp_path / "edge-agent.toml"
    path.write_text(f'[box]\ndata_dir = "{box.data_dir}"\n')
    with status.run_lock(box.data_dir), pytest.raises(SiteError, match="another edge-agent runs"):
        cli.enroll("wr1.token", path, replace=True)
    assert identity.is_enrolled(box.data_dir)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ("https://localhost:1", "localhost", 8883)),
        ({"url": "https://new.example:9443/"}, ("https://new.example:9443", "new.example", 8883)),
        ({"mqtt_port": 1883}, ("https://localhost:1", "localhost", 1883)),
        ({"url": "https://new.example", "mqtt_port": 1883}, ("https://new.example", "new.example", 1883)),
    ],
)
def test_where_the_hub_is(tmp_path: Path, keys: dict[str, object], expected: tuple[str, str, int]) -> None:
    box = make_box(tmp_path, AUTHORITY, 8883, hub=keys)
    address = box.enrolled.address.under(box.config.hub)
    assert (address.hub_url, address.mqtt_host, address.mqtt_port) == expected


def test_doctor_asks_the_hub_where_it_is_now(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker:
        hub = replace(box.config.hub, url="https://127.0.0.1:1", mqtt_port=broker.getsockname()[1])
        checks = [c for c in doctor.examine(replace(box.config, hub=hub)) if c.name.startswith("hub")]
    assert (checks[0].name, checks[0].level) == ("hub broker", Level.OK)
    assert "https://127.0.0.1:1" in checks[1].finding


@pytest.mark.parametrize("part", ["device.key", "device.pem", "ca.pem", "link.json"])
def test_doctor_goes_on_where_the_identity_is_damaged(box: Box, part: str) -> None:
    (identity.folder(box.data_dir).path / part).write_bytes(b"half")
    said = {check.name: check for check in doctor.examine(box.config)}
    assert said["identity"].level is Level.ERROR
    assert said["identity"].advice
