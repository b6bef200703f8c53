"""The hub renews its own certificates while it runs: broker, HTTPS and its own link go on with the new ones."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from cloud_hub import setup
from fleet_link import pki
from fleet_link.messages import Receipt
from tests.cloud_hub.box_twin import until
from tests.cloud_hub.hub_support import HubFiles, make_hub_files, needs_mosquitto, served_serial
from tests.cloud_hub.round_support import needs_bundle
from tests.cloud_hub.test_service import HubProcess

DAY_S = 86_400.0


class HastyHub(HubProcess):
    """Looks at its certificates several times a second instead of daily."""

    def spawn(self) -> "subprocess.Popen[bytes]":
        code = "from cloud_hub import service; service.RENEW_S = 0.2; from cloud_hub.cli import main; main()"
        command = [sys.executable, "-c", code, "run", "--config", str(self.folder / "hub" / "hub.toml")]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HastyHub]:
    made = HastyHub(tmp_path)
    yield made
    made.close()


def age(files: HubFiles, days: float) -> None:
    """Put certificates in the place of the hub's own that were issued for 30 days so long ago."""
    paths, authority = files.config.paths, files.authority
    server, link = (pki.load_private_key(path).public_key() for path in (paths.server_key, paths.hub_key))
    then = time.time() - days * DAY_S
    names = ["localhost", "127.0.0.1", "::1"]
    paths.server_certificate.write_bytes(authority.chain_pem(authority.issue_server(server, names, days=30, now=then)))
    paths.hub_certificate.write_bytes(authority.chain_pem(authority.issue_hub(link, days=30, now=then)))


def on_disk(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.slow
@needs_bundle
@needs_mosquitto
def test_a_running_hub_renews_and_uses_its_own_certificates(hub: HastyHub) -> None:
    hub.start()
    box, paths = hub.add_box("a"), hub.config.paths
    ports = (hub.config.https.port, hub.config.broker.port)
    until(lambda: box.bus.connected)
    before = {served_serial(port, paths.ca_certificate) for port in ports}
    age(hub.files, 25.0)
    aged = {on_disk(paths.server_certificate).serial_number, on_disk(paths.hub_certificate).serial_number}

    def served() -> set[int]:
        return {served_serial(port, paths.ca_certificate) for port in ports}

    until(lambda: len(served()) == 1 and not served() & (before | aged), lambda: time.sleep(0.1))
    assert served() == {on_disk(paths.server_certificate).serial_number}
    # The hub signs with its new certificate, and hears and is heard.

    def heard() -> list[Receipt]:
        box.answer("r-unknown")  # again and again: the link is just connecting anew
        return box.of(Receipt)

    hub.until(heard)
    serial = pki.serial_hex(on_disk(paths.hub_certificate))
    assert int(serial, 16) not in aged
    assert box.hub_serials[-1] == serial


@pytest.mark.parametrize(("days", "is_new"), [(5.0, False), (19.0, False), (21.0, True), (31.0, True), (-2.0, True)])
def test_a_certificate_is_renewed_in_its_last_third_or_from_the_future(
    tmp_path: Path, days: float, is_new: bool
) -> None:
    files = make_hub_files(tmp_path)
    age(files, days)
    aged = on_disk(files.config.paths.server_certificate)
    assert setup.renew_own_certificates(files.config, files.authority, now=time.time()) is is_new
    assert (on_disk(files.config.paths.server_certificate) != aged) is is_new
    assert setup.renew_own_certificates(files.config, files.authority, now=time.time()) is False
