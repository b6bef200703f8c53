"""A hub as a process, with the box's own enrolment: its root offline, another intermediate while it runs, or of before."""

import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509

from benchmarks.processes import free_port
from cloud_hub import ca, config
from edge_agent import identity
from edge_agent.config import Hub
from fleet_link import pki
from fleet_link.bus import Bus, BusConfig
from fleet_link.topics import device_subscription
from tests.cloud_hub.box_twin import until
from tests.cloud_hub.hub_support import needs_mosquitto, new_key
from tests.cloud_hub.round_support import needs_bundle
from tests.cloud_hub.test_service import HubProcess

pytestmark = [needs_bundle, needs_mosquitto, pytest.mark.slow]
LEAD_S = 5
AS_ENROLLED = Hub(enabled=True, url="", mqtt_port=0, heartbeat_s=20.0)


class HastyHub(HubProcess):
    """Looks at ca.pem several times a second instead of daily; an intermediate signs after seconds instead of a week."""

    def spawn(self, **environment: str) -> "subprocess.Popen[bytes]":
        code = (
            "from datetime import timedelta; from cloud_hub import ca, service; service.RENEW_S = 0.2; "
            f"ca.LEAD = timedelta(seconds={LEAD_S}); from cloud_hub.cli import main; main()"
        )
        command = [sys.executable, "-c", code, "run", "--config", str(self.folder / "hub" / "hub.toml")]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        program = [sys.executable, "-c", "from cloud_hub.cli import main; main()", words[0]]
        where = ["--config", str(self.folder / "hub" / "hub.toml")]
        return subprocess.run([*program, *where, *words[1:]], capture_output=True, text=True, check=False)


@dataclass
class RealBox:
    """Enrolled over HTTPS with the box's own code, connected with its own files."""

    enrolled: identity.Enrolled
    bus: Bus

    @property
    def issuer(self) -> x509.Name:
        return x509.load_der_x509_certificate(self.enrolled.identity.certificate_der).issuer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HastyHub]:
    made = HastyHub(tmp_path)
    yield made
    made.close()


@pytest.fixture
def connections() -> Iterator[list[Bus]]:
    buses: list[Bus] = []
    yield buses
    for bus in buses:
        bus.stop()


def let_in(hub: HubProcess, name: str, connections: list[Bus]) -> RealBox:
    token = hub.api("POST", "/devices", {"device": name, "site": "north"})["token"]
    data_dir = hub.folder / name
    data_dir.mkdir()
    enrolled = identity.enroll(str(token), data_dir)
    here = enrolled.folder
    files = BusConfig("localhost", hub.config.broker.port, name, here.ca, here.certificate, here.key)
    bus = Bus(files, [device_subscription(name)])
    connections.append(bus)
    bus.start()
    until(lambda: bus.connected)
    return RealBox(enrolled, bus)


def revoke(hub: HubProcess, name: str) -> dict[str, object]:
    """What the broker showed of it."""
    shown = hub.api("POST", f"/devices/{name}/revoke")["cut_off"]
    assert isinstance(shown, dict)
    return shown


def meet_with_the_root_alone(hub: HubProcess, root_pem: bytes) -> None:
    """TLS to both ports. Raises ssl.SSLError."""
    context = ssl.create_default_context(cadata=root_pem.decode())
    with socket.create_connection(("localhost", hub.config.https.port)) as plain:
        context.wrap_socket(plain, server_hostname="localhost").close()
    paths = hub.config.paths
    context.load_cert_chain(paths.hub_certificate, paths.hub_key)
    with socket.create_connection(("localhost", hub.config.broker.port)) as plain:
        context.wrap_socket(plain, server_hostname="localhost").close()


def test_the_root_is_offline_and_another_intermediate_is_taken_up_while_the_hub_runs(
    hub: HastyHub, connections: list[Bus]
) -> None:
    paths, vault = hub.config.paths, hub.folder / "vault"
    vault.mkdir()
    for path in (paths.root_key, paths.root_passphrase):
        shutil.move(path, vault / path.name)
    hub.start()
    hub.api("POST", "/sites", {"site": "north"})
    first = let_in(hub, "first", connections)
    root_pem = identity.root_pem(first.enrolled.folder)
    assert pki.fingerprint(ssl.PEM_cert_to_DER_cert(root_pem.decode())) == hub.files.authority.sha256
    meet_with_the_root_alone(hub, root_pem)
    # 1. Made beside the running hub, with the root's key from elsewhere; shown to the boxes from then on.
    keys = ["--root-key", str(vault / "root.key"), "--root-passphrase", str(vault / "root.passphrase")]
    done = hub.command("new-intermediate", *keys)
    assert done.returncode == 0, done.stderr
    former, new = (
        one.certificate for one in ca.load(paths.ca_key, paths.ca_certificate, hub.config.ca_passphrase).issuers
    )
    until(lambda: identity.learn_authorities(first.enrolled, AS_ENROLLED))
    assert first.enrolled.folder.ca.read_bytes() == paths.ca_certificate.read_bytes()
    # 2. It signs when the boxes have had the time; the broker, started before, lets its first box in.
    signs_from = (new.not_valid_before_utc + ca.SKEW).timestamp() + LEAD_S
    until(lambda: time.time() > signs_from + 1)
    second = let_in(hub, "second", connections)
    assert (first.issuer, second.issuer) == (former.subject, new.subject)
    assert first.bus.connected
    # 3. After a restart both are back, and what the new one has signed can be revoked.
    hub.kill()
    hub.start()
    until(lambda: first.bus.connected and second.bus.connected)
    assert revoke(hub, "second")["refuses"] is True
    until(lambda: not second.bus.connected)
    assert first.bus.connected
    meet_with_the_root_alone(hub, root_pem)


def write_hub_of_before(folder: Path) -> None:
    """As `hub init` left it in version 0.1: one CA, its encrypted key, no root beside it."""
    text = config.default_text()
    for section in ("broker", "https"):
        text = config.with_value(text, section, "bind", "127.0.0.1")
        text = config.with_value(text, section, "port", free_port())
    (folder / "ca").mkdir(parents=True)
    (folder / "hub.toml").write_text(text)
    single, passphrase = ca.create(new_key(), name="Wardround hub localhost", now=time.time()), b"of before"
    pki.write_secret(folder / "ca.passphrase", passphrase)
    pki.write_secret(folder / "ca" / "ca.key", pki.private_key_pem(single.issuers[0].key, passphrase=passphrase))
    (folder / "ca" / "ca.pem").write_bytes(single.pem)


def test_a_hub_of_before_runs_on_and_lets_boxes_in(tmp_path: Path, connections: list[Bus]) -> None:
    write_hub_of_before(tmp_path / "hub")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hub" / "ca").iterdir()}
    hub = HastyHub(tmp_path)
    try:
        hub.start()
        hub.api("POST", "/sites", {"site": "north"})
        box = let_in(hub, "first", connections)
        assert box.enrolled.folder.ca.read_bytes() == before["ca.pem"]
        assert not identity.learn_authorities(box.enrolled, AS_ENROLLED)
        assert revoke(hub, "first")["refuses"] is True
        refused = hub.command("new-intermediate")
        assert (refused.returncode, "can have no intermediate" in refused.stderr.replace("\n", " ")) == (3, True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "hub" / "ca").iterdir()} == before
        assert not hub.config.paths.root_passphrase.exists()
    finally:
        hub.close()
