"""The broker: who may connect, who may say what, and that it lives and ends with the hub."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from cryptography import x509

from cloud_hub import broker, ca, registry, setup
from cloud_hub.broker import Broker
from fleet_link import pki
from fleet_link.errors import SiteError
from tests.cloud_hub.hub_support import (
    HubFiles,
    Peer,
    await_true,
    make_hub_files,
    needs_mosquitto,
    pem,
    served_serial,
)

pytestmark = [needs_mosquitto, pytest.mark.slow]

NOT_AUTHORISED = 135
NO_SUBSCRIBERS = 16


class Running:
    """A broker with two enrolled devices."""

    def __init__(self, folder: Path, *, single_ca: bool = False, **broker_settings: int) -> None:
        self.folder = folder
        self.hub: HubFiles = make_hub_files(folder / "hub", single_ca=single_ca)
        broker_section = msgspec.structs.replace(self.hub.config.broker, **broker_settings)
        self.hub.config = msgspec.structs.replace(self.hub.config, broker=broker_section)
        self.hub.add_device("box-a")
        self.hub.add_device("box-b")
        self.refused: list[str] = []
        self.broker = Broker(self.hub.config, write_access=self.hub.write_access, on_refused=self.refused.append)
        self.broker.start()
        self.peers: list[Peer] = []

    def connect(self, certificate: Path | None, key: Path | None, *, name: str = "any") -> Peer:
        paths = self.hub.config.paths
        peer = Peer(self.hub.config.broker.port, paths.ca_certificate, certificate, key, name=name)
        self.peers.append(peer)
        return peer

    def device(self, device: str, *, name: str = "any") -> Peer:
        peer = self.connect(*self.hub.device_files(self.folder, device), name=name)
        await_true(lambda: peer.connected)
        return peer

    def hub_peer(self) -> Peer:
        paths = self.hub.config.paths
        peer = self.connect(paths.hub_certificate, paths.hub_key)
        await_true(lambda: peer.connected)
        return peer

    def await_refused(self, word: str) -> None:
        def seen() -> bool:
            self.broker.watch()
            return any(word in reason for reason in self.refused)

        await_true(seen)

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.broker.stop()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    hub = Running(tmp_path)
    yield hub
    hub.close()


def test_a_device_and_the_hub_hear_each_other(running: Running) -> None:
    hub, box = running.hub_peer(), running.device("box-a")
    assert hub.subscribe("wr1/up/+/+") == 1
    assert box.subscribe("wr1/down/box-a/+") == 1
    assert box.publish("wr1/up/box-a/msg", b"up") == 0
    assert hub.publish("wr1/down/box-a/msg", b"down") == 0
    await_true(lambda: hub.received == [("wr1/up/box-a/msg", b"up")])
    await_true(lambda: box.received == [("wr1/down/box-a/msg", b"down")])


def test_a_device_may_use_its_own_topics_only(running: Running) -> None:
    box = running.device("box-a")
    assert box.publish("wr1/up/box-b/msg") == NOT_AUTHORISED
    assert box.publish("wr1/down/box-a/msg") == NOT_AUTHORISED
    assert box.publish("other/topic") == NOT_AUTHORISED
    for topic in ("wr1/up/box-a", "wr1/up/box-a/other", "wr1/up/box-a/msg/more"):
        assert box.publish(topic) == NOT_AUTHORISED
    assert box.publish("wr1/up/box-a/chunk") == NO_SUBSCRIBERS
    assert box.publish("wr1/up/box-a/msg") == NO_SUBSCRIBERS
    hub = running.hub_peer()
    box.subscribe("wr1/#")
    assert hub.publish("wr1/down/box-b/msg", b"for b") in (0, NO_SUBSCRIBERS)
    assert hub.publish("wr1/down/box-a/msg", b"for a") in (0, NO_SUBSCRIBERS)
    await_true(lambda: box.received != [])
    assert box.received == [("wr1/down/box-a/msg", b"for a")]


def test_the_hub_may_use_the_fleets_topics_only(running: Running) -> None:
    hub, box = running.hub_peer(), running.device("box-a")
    for topic in ("wr1/down/box-a/other", "wr1/up/box-a/msg", "other/topic"):
        assert hub.publish(topic) == NOT_AUTHORISED
    hub.subscribe("#")
    assert box.publish("wr1/up/box-a/msg", b"1") == 0
    assert box.publish("wr1/up/box-a/chunk", b"2") == 0
    await_true(lambda: [payload for _, payload in hub.received] == [b"1", b"2"])


def test_a_retained_message_ends_the_connection_and_stays_nowhere(running: Running) -> None:
    box = running.device("box-a")
    box.client.publish("wr1/up/box-a/msg", b"for ever", qos=1, retain=True)
    await_true(lambda: box.disconnects > 0)
    hub = running.hub_peer()
    hub.subscribe("wr1/up/+/+")
    assert running.device("box-b").publish("wr1/up/box-b/msg", b"now") == 0
    await_true(lambda: hub.received != [])
    assert hub.received == [("wr1/up/box-b/msg", b"now")]


def test_the_broker_takes_no_more_memory_than_configured(tmp_path: Path) -> None:
    """Messages for a hub that hangs: the box that fills the broker loses its connection, and all goes on after that."""
    running = Running(tmp_path, memory_bytes_max=64 * 1024**2)
    try:
        hub, box = running.hub_peer(), running.device("box-a")
        hub.subscribe("wr1/up/+/+")
        hub.client.loop_stop()  # from here on it reads nothing
        process = psutil.Process(int((running.hub.config.paths.broker / "mosquitto.pid").read_text()))
        for _ in range(1000):  # 125 MB
            if box.disconnects:
                break
            with contextlib.suppress(RuntimeError):  # it has just lost its connection
                box.client.publish("wr1/up/box-a/chunk", b"x" * 125_000, qos=1).wait_for_publish(10.0)
        assert box.disconnects > 0
        assert process.memory_info().rss < 120 * 1024**2
        box.client.disconnect()
        hub.client.socket().close()
        await_true(lambda: running.device("box-b").publish("wr1/up/box-b/msg") == NO_SUBSCRIBERS)
    finally:
        running.close()


def test_the_list_is_written_anew_when_it_is_a_day_old_or_from_the_future(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def number() -> int:
        return x509.load_pem_x509_crl(running.hub.config.paths.crl.read_bytes()).extensions[0].value.crl_number

    now, written = time.time(), number()
    for clock, is_anew in ((now + 86_000, False), (now + 87_000, True), (now + 87_500, False), (now - 7200, True)):
        monkeypatch.setattr("cloud_hub.broker.time.time", lambda clock=clock: clock)
        running.broker.watch()
        assert (number() != written) is is_anew, clock - now
        written = number()


def test_a_renewed_server_certificate_is_served_after_a_reload(running: Running) -> None:
    paths, hub = running.hub.config.paths, running.hub
    key = pki.load_private_key(paths.server_key)
    renewed = hub.authority.issue_server(key.public_key(), ["localhost"], days=30, now=time.time())
    assert served_serial(hub.config.broker.port, paths.ca_certificate) != renewed.serial_number
    paths.server_certificate.write_bytes(hub.authority.chain_pem(renewed))
    running.broker.reload()
    await_true(lambda: served_serial(hub.config.broker.port, paths.ca_certificate) == renewed.serial_number)


def test_no_device_can_take_anothers_client_id(running: Running) -> None:
    first = running.device("box-a", name="box-a")
    running.device("box-b", name="box-a")
    assert first.publish("wr1/up/box-a/msg") == NO_SUBSCRIBERS
    assert first.connected


def test_a_peer_without_certificate_is_refused_and_it_is_seen(running: Running) -> None:
    peer = running.connect(None, None)
    running.await_refused("peer did not return a certificate")
    assert not peer.connected


def test_a_certificate_of_another_authority_is_refused_and_it_is_seen(running: Running, tmp_path: Path) -> None:
    stranger = make_hub_files(tmp_path / "stranger")
    stranger.add_device("box-a")
    (tmp_path / "files").mkdir()
    peer = running.connect(*stranger.device_files(tmp_path / "files", "box-a"))
    running.await_refused("certificate verify failed")
    assert not peer.connected


def test_an_expired_certificate_is_refused_and_it_is_seen(running: Running, tmp_path: Path) -> None:
    long_ago = time.time() - 10 * 86400
    peer = running.connect(*running.hub.device_files(tmp_path, "box-a", days=1, now=long_ago))
    running.await_refused("certificate verify failed")
    assert not peer.connected


def test_a_revoked_device_falls_silent_at_once_and_cannot_come_back(running: Running) -> None:
    files = running.hub.device_files(running.folder, "box-a")
    box = running.connect(*files)
    await_true(lambda: box.connected)
    other = running.device("box-b")
    assert box.publish("wr1/up/box-a/msg") == NO_SUBSCRIBERS
    with running.hub.database.writing() as session:
        registry.revoke(session, "box-a", now=time.time())
    running.broker.reload()
    await_true(lambda: box.publish("wr1/up/box-a/msg") == NOT_AUTHORISED)
    assert other.publish("wr1/up/box-b/msg") == NO_SUBSCRIBERS
    again = running.connect(*files)
    running.await_refused("certificate verify failed")
    assert not again.connected


def another_intermediate(hub: HubFiles) -> ca.Issuer:
    """Made a month ago, so that it signs from now on; the running hub has it."""
    paths, then = hub.config.paths, time.time() - 30 * 86_400.0
    made = setup.new_intermediate(hub.config, paths.root_key, paths.root_passphrase, now=then)
    assert setup.take_up_intermediate(hub.config, hub.authority)
    return made


def first_certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_devices_of_two_intermediates_connect_and_each_list_revokes_its_own(running: Running) -> None:
    """The broker was started before the second one was made."""
    first = running.hub.device_files(running.folder, "box-a")
    made = another_intermediate(running.hub)
    second = running.hub.device_files(running.folder, "box-b")
    assert first_certificate(second[0]).issuer == made.certificate.subject != first_certificate(first[0]).issuer
    (running.folder / "leaf.pem").write_bytes(pem(first_certificate(second[0])))
    without_chain = (running.folder / "leaf.pem", second[1])
    # 1. Until its intermediate has a list, the broker refuses what it has signed.
    refused = running.connect(*second)
    running.await_refused("certificate verify failed")
    assert not refused.connected
    refused.close()
    # 2. After the reload both are let in, with the intermediate shown or not.
    running.broker.reload()
    for files in (first, second, without_chain):
        peer = running.connect(*files)
        await_true(lambda peer=peer: peer.connected)
        peer.close()
    # 3. Revoked, each by its own issuer's list.
    for device, files in (("box-a", first), ("box-b", second)):
        peer = running.connect(*files)
        await_true(lambda peer=peer: peer.connected)
        with running.hub.database.writing() as session:
            registry.revoke(session, device, now=time.time())
        running.broker.reload()
        await_true(lambda peer=peer, device=device: peer.publish(f"wr1/up/{device}/msg") == NOT_AUTHORISED)
        peer.close()
        running.broker.watch()
        running.refused.clear()
        again = running.connect(*files)
        running.await_refused("certificate verify failed")
        assert not again.connected
        again.close()


def test_a_broker_of_a_hub_of_before_admits_and_revokes(tmp_path: Path) -> None:
    running = Running(tmp_path, single_ca=True)
    try:
        assert running.hub.config.paths.ca_certificate.read_text().count("BEGIN CERTIFICATE") == 1
        box = running.device("box-a")
        assert box.publish("wr1/up/box-a/msg") == NO_SUBSCRIBERS
        with running.hub.database.writing() as session:
            registry.revoke(session, "box-a", now=time.time())
        running.broker.reload()
        await_true(lambda: box.publish("wr1/up/box-a/msg") == NOT_AUTHORISED)
        box.close()
        again = running.connect(running.folder / "box-a.pem", running.folder / "box-a.key")
        running.await_refused("certificate verify failed")
        assert not again.connected
        assert running.device("box-b").publish("wr1/up/box-b/msg") == NO_SUBSCRIBERS
    finally:
        running.close()


def test_a_device_added_later_is_let_in_after_a_reload(running: Running) -> None:
    running.hub.add_device("box-c")
    running.broker.reload()
    box = running.device("box-c")
    await_true(lambda: box.publish("wr1/up/box-c/msg") == NO_SUBSCRIBERS)


def test_a_chunk_passes_and_anything_larger_is_refused(running: Running) -> None:
    hub, box = running.hub_peer(), running.device("box-a")
    hub.subscribe("wr1/up/+/+")
    assert box.publish("wr1/up/box-a/chunk", b"x" * broker.MESSAGE_BYTES_MAX) == 0
    box.client.publish("wr1/up/box-a/chunk", b"x" * (broker.MESSAGE_BYTES_MAX + 1), qos=1)
    await_true(lambda: box.disconnects > 0)
    assert [len(payload) for _, payload in hub.received] == [broker.MESSAGE_BYTES_MAX]


def test_a_huge_packet_ends_the_connection(running: Running) -> None:
    box = running.device("box-a")
    box.client.publish("wr1/up/box-a/chunk", b"x" * broker.PACKET_BYTES_MAX, qos=0)
    await_true(lambda: box.disconnects > 0)


def test_a_broker_that_dies_is_started_again(running: Running) -> None:
    box = running.device("box-a")
    pid = int((running.hub.config.paths.broker / "mosquitto.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    await_true(lambda: not running.broker.running)

    def back() -> bool:
        running.broker.watch()
        return running.broker.running and box.connected

    await_true(back)
    assert running.broker.restarts == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1795: OpenSSL Error[0]: error:0A000086:SSL routines::certificate verify failed", "certificate verify failed"),
        (
            "1795: Client connection from 127.0.0.1 failed: error:0A00010B:SSL routines::wrong version number.",
            "wrong version number",
        ),
        ("1795: Client box-a disconnected, not authorised.", "box-a: not authorised"),
        ("1795: Client box-a disconnected: Protocol error.", "box-a: Protocol error"),
        ("1795: Client <unknown> disconnected: Protocol error.", None),
        ("1795: Client box-a disconnected.", None),
        ("1795: New client connected from 127.0.0.1:32905 as box-a (p5, c1, k60, u'box-a').", None),
    ],
)
def test_refused_connections_are_read_from_the_log(line: str, reason: str | None) -> None:
    assert broker.refused_connection(line) == reason


def test_what_does_not_speak_tls_is_refused_and_seen(running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.hub.config.broker.port)) as plain:
        plain.sendall(b"\x10\x0c\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x00")
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(100)[:1] in (b"", b"\x15")  # closed, or a TLS alert
    running.await_refused("wrong version number")


def test_a_taken_port_is_said_with_advice(running: Running) -> None:
    second = Broker(running.hub.config, write_access=running.hub.write_access, on_refused=running.refused.append)
    (running.hub.config.paths.broker / "mosquitto.pid").unlink()
    with pytest.raises(SiteError, match="Address already in use") as caught:
        second.start()
    assert str(running.hub.config.broker.port) in caught.value.advice


def test_the_broker_does_not_outlive_a_killed_hub(tmp_path: Path) -> None:
    hub = make_hub_files(tmp_path)
    hub.write_access()
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom cloud_hub import config\nfrom cloud_hub.broker import Broker\n"
        "settings = config.load(Path(sys.argv[1]))\n"
        "Broker(settings, write_access=lambda: None, on_refused=print).start()\nprint('up', flush=True)\ntime.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "hub.toml")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    pid = int((hub.config.paths.broker / "mosquitto.pid").read_text())
    child.kill()
    child.wait()
    await_true(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", hub.config.broker.port)) != 0


def test_a_stale_broker_is_ended_and_a_strangers_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (tmp_path / "mosquitto.pid").write_text(str(stranger.pid))
        broker.end_stale(tmp_path)
        assert stranger.poll() is None
        assert not (tmp_path / "mosquitto.pid").exists()
    finally:
        stranger.kill()
        stranger.wait()
    hub = make_hub_files(tmp_path / "hub")
    first = Broker(hub.config, write_access=hub.write_access, on_refused=print)
    first.start()
    second = Broker(hub.config, write_access=hub.write_access, on_refused=print)
    second.start()
    assert not first.running
    assert second.running
    second.stop()
