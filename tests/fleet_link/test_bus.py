"""The connection, on a real Mosquitto: who gets in, what is refused, what happens when the broker dies or hangs."""

import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from benchmarks.processes import free_port
from fleet_link.bus import MAX_PAYLOAD_BYTES, MAX_QUEUED_CHUNKS, Bus, BusConfig, Received
from fleet_link.errors import LinkError, SiteError
from fleet_link.topics import Channel, Direction, Topic, device_subscription, hub_subscription
from tests.fleet_link.mosquitto_support import Mosquitto, TestAuthority

pytestmark = pytest.mark.slow

UP = Topic(Direction.UP, "box-1", Channel.MESSAGE)
UP_CHUNK = Topic(Direction.UP, "box-1", Channel.CHUNK)
DOWN = Topic(Direction.DOWN, "box-1", Channel.MESSAGE)


def eventually(condition: Callable[[], bool]) -> None:
    """No deadline of its own: pytest's time-out ends a test that never comes true."""
    while not condition():
        time.sleep(0.01)


@contextmanager
def running(config: BusConfig, *subscriptions: str, wait: bool = True) -> Iterator[Bus]:
    bus = Bus(config, list(subscriptions))
    bus.start()
    try:
        if wait:
            eventually(lambda: bus.connected)
        yield bus
    finally:
        bus.stop()


@pytest.fixture
def hub(broker: Mosquitto, authority: TestAuthority) -> Iterator[Bus]:
    with running(broker.config(authority.issue("hub")), hub_subscription()) as bus:
        yield bus


@pytest.fixture
def box(broker: Mosquitto, authority: TestAuthority) -> Iterator[Bus]:
    with running(broker.config(authority.issue("box-1")), device_subscription("box-1")) as bus:
        yield bus


def test_messages_and_chunks_go_both_ways(hub: Bus, box: Bus) -> None:
    assert box.publish_message(UP, b"up")
    assert hub.receive(10) == Received(UP, b"up")
    assert hub.publish_message(DOWN, b"down")
    assert box.receive(10) == Received(DOWN, b"down")
    assert box.publish_chunk(UP_CHUNK, b"x" * 65_556)
    assert hub.receive(10) == Received(UP_CHUNK, b"x" * 65_556)
    assert hub.receive(0) is None
    assert box.last_error == ""


def test_the_connection_is_tls_13_without_nagle(box: Bus) -> None:
    assert box._client is not None
    sock = box._client.socket()
    assert isinstance(sock, ssl.SSLSocket)
    assert sock.version() == "TLSv1.3"
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_the_largest_payload_passes_and_a_larger_one_never_reaches_the_broker(hub: Bus, box: Bus) -> None:
    assert box.publish_message(UP, b"x" * MAX_PAYLOAD_BYTES)
    received = hub.receive(10)
    assert received is not None
    assert len(received.payload) == MAX_PAYLOAD_BYTES
    for publish in (box.publish_message, box.publish_chunk):
        with pytest.raises(LinkError, match="send it in chunks"):
            publish(UP, b"x" * (MAX_PAYLOAD_BYTES + 1))
    assert box.publish_message(UP, b"after")
    assert hub.receive(10) == Received(UP, b"after")


def test_a_device_speaks_and_hears_only_for_itself(
    hub: Bus, box: Bus, broker: Mosquitto, authority: TestAuthority
) -> None:
    spy_config = broker.config(authority.issue("box-2"))
    with running(spy_config, device_subscription("box-1"), "wr1/#", device_subscription("box-2")) as spy:
        for topic in (UP, DOWN, Topic(Direction.DOWN, "box-2", Channel.MESSAGE)):
            spy.publish_message(topic, b"forged")
        own = Topic(Direction.UP, "box-2", Channel.MESSAGE)
        spy.publish_message(own, b"mine")
        assert hub.receive(10) == Received(own, b"mine")  # the forged ones before it were not let through
        hub.publish_message(DOWN, b"for box-1")
        assert box.receive(10) == Received(DOWN, b"for box-1")
        to_spy = Topic(Direction.DOWN, "box-2", Channel.MESSAGE)
        hub.publish_message(to_spy, b"for box-2")
        assert spy.receive(10) == Received(to_spy, b"for box-2")


def test_another_client_id_with_a_valid_certificate_does_not_push_a_device_out(
    box: Bus, hub: Bus, broker: Mosquitto, authority: TestAuthority
) -> None:
    config = broker.config(authority.issue("box-2"), name="box-1", certificate_path=broker.folder / "box-2.pem")
    thief = BusConfig(**(vars(config) | {"key_path": broker.folder / "box-2.key"}))
    with running(thief, device_subscription("box-1")):
        hub.publish_message(DOWN, b"still here")
        assert box.receive(10) == Received(DOWN, b"still here")
        assert box.connected


# --- refused --------------------------------------------------------------------------------------


def refused_with(config: BusConfig) -> str:
    with running(config, device_subscription("box-1"), wait=False) as bus:
        eventually(lambda: bus.last_error != "")
        assert not bus.connected
        assert not bus.publish_message(UP, b"")
        assert not bus.publish_chunk(UP_CHUNK, b"")
        return bus.last_error


def test_an_expired_and_a_foreign_certificate_are_refused_by_the_broker(
    broker: Mosquitto, authority: TestAuthority
) -> None:
    for identity in (authority.issue("box-1", to_days=-0.1), TestAuthority(authority.name).issue("box-1")):
        error = refused_with(broker.config(identity))
        assert "the broker closed the connection" in error
        assert "revoked or expired" in error


def test_a_broker_of_another_ca_is_refused(broker: Mosquitto, authority: TestAuthority) -> None:
    (broker.folder / "other.pem").write_bytes(TestAuthority("other").pem)
    config = broker.config(authority.issue("box-1"), ca_path=broker.folder / "other.pem")
    assert "certificate is not accepted" in refused_with(config)


@pytest.mark.parametrize(
    ("usages", "hosts", "days"),
    [
        ((ExtendedKeyUsageOID.SERVER_AUTH,), ("other.example",), 30.0),
        ((ExtendedKeyUsageOID.CLIENT_AUTH,), ("localhost",), 30.0),
        ((ExtendedKeyUsageOID.SERVER_AUTH,), ("localhost",), -0.1),
    ],
    ids=["other host", "a device as server", "expired"],
)
def test_a_broker_with_a_wrong_certificate_is_refused(
    broker: Mosquitto, authority: TestAuthority, usages: tuple[object, ...], hosts: tuple[str, ...], days: float
) -> None:
    broker.stop()
    broker.set_server(authority.issue("server", usages=usages, hosts=hosts, to_days=days))  # type: ignore[arg-type]
    broker.start()
    assert "certificate is not accepted" in refused_with(broker.config(authority.issue("box-1")))


def test_an_older_tls_is_refused(broker: Mosquitto, authority: TestAuthority) -> None:
    """Mosquitto's tls_version is a minimum, so the server that knows no more than TLS 1.2 is Python's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(broker.folder / "server.pem", broker.folder / "server.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_one() -> None:
            with suppress(OSError):
                context.wrap_socket(listener.accept()[0], server_side=True).close()

        server = threading.Thread(target=answer_one)
        server.start()
        config = broker.config(authority.issue("box-1"), port=listener.getsockname()[1])
        assert "no TLS 1.3 with the broker" in refused_with(config)
        server.join()


def test_nobody_there_and_no_such_host(broker: Mosquitto, authority: TestAuthority) -> None:
    identity = authority.issue("box-1")
    assert "nothing listens" in refused_with(broker.config(identity, port=free_port()))
    assert "does not resolve" in refused_with(broker.config(identity, host="no-such-host.invalid"))


@pytest.mark.parametrize("missing", ["ca_path", "certificate_path", "key_path"])
def test_missing_files_are_told_at_once(
    broker: Mosquitto, authority: TestAuthority, tmp_path: Path, missing: str
) -> None:
    config = broker.config(authority.issue("box-1"), **{missing: tmp_path / "missing"})
    with pytest.raises(SiteError, match="cannot be used") as refused:
        Bus(config, []).start()
    assert "enrol" in refused.value.advice


# --- a broker that dies or hangs ------------------------------------------------------------------


def test_comes_back_by_itself_after_the_broker_was_killed(hub: Bus, box: Bus, broker: Mosquitto) -> None:
    broker.kill()
    eventually(lambda: not box.connected and not hub.connected)
    assert "connection lost" in box.last_error or "nothing listens" in box.last_error
    assert not box.publish_message(UP, b"while away")
    assert not box.publish_chunk(UP_CHUNK, b"while away")
    broker.start()
    eventually(lambda: box.connected and hub.connected)
    assert box.last_error == ""
    assert box.publish_message(UP, b"back")
    assert hub.receive(10) == Received(UP, b"back")


def test_waits_for_a_broker_that_starts_later(broker: Mosquitto, authority: TestAuthority) -> None:
    broker.stop()
    with running(broker.config(authority.issue("box-1")), device_subscription("box-1"), wait=False) as bus:
        eventually(lambda: "nothing listens" in bus.last_error)
        broker.start()
        eventually(lambda: bus.connected)


def test_a_broker_that_hangs_pushes_back_and_nothing_piles_up(hub: Bus, box: Bus, broker: Mosquitto) -> None:
    broker.send_signal(signal.SIGSTOP)
    sent = 0
    while box.publish_chunk(UP_CHUNK, b"x" * 65_536):
        sent += 1
        time.sleep(0.001)  # the network thread fills the socket's buffers first
    assert box._client is not None
    assert len(box._client._out_packet) <= MAX_QUEUED_CHUNKS + 1
    broker.send_signal(signal.SIGCONT)
    eventually(lambda: box.publish_chunk(UP_CHUNK, b"last"))
    received = 0
    while (message := hub.receive(10)) is not None and message.payload != b"last":
        received += 1
    assert received == sent


def test_stops_while_the_broker_hangs(box: Bus, broker: Mosquitto) -> None:
    threads = threading.active_count()
    broker.send_signal(signal.SIGSTOP)
    while box.publish_chunk(UP_CHUNK, b"x" * 65_536):
        time.sleep(0.001)
    box.stop()
    assert threading.active_count() == threads - 1
    assert not box.connected


def test_stops_while_its_own_queue_is_full(hub: Bus, box: Bus) -> None:
    for _ in range(400):  # more than the hub's queue; nobody receives
        eventually(lambda: box.publish_chunk(UP_CHUNK, b"x"))
    eventually(lambda: hub._received.full())
    hub.stop()
    assert not hub.connected


def test_starts_again_after_a_stop_with_a_new_certificate(
    hub: Bus, box: Bus, broker: Mosquitto, authority: TestAuthority
) -> None:
    box.stop()
    box.stop()  # twice does no harm
    broker.config(authority.issue("box-1"))  # writes a new key and certificate in place
    box.start()
    eventually(lambda: box.connected)
    box.publish_message(UP, b"renewed")
    assert hub.receive(10) == Received(UP, b"renewed")


def test_foreign_topics_are_dropped(hub: Bus, broker: Mosquitto, authority: TestAuthority) -> None:
    with running(broker.config(authority.issue("hub"), name="hub"), "wr1/#") as second:
        assert second._client is not None
        second._client.publish("wr1/up/NOT A DEVICE/msg", b"junk")
        second._client.publish("wr1/other", b"junk")
        second.publish_message(DOWN, b"good")
        assert second.receive(10) == Received(DOWN, b"good")


def test_who_waits_for_room_for_chunks_is_woken_when_half_of_them_went(hub: Bus, box: Bus) -> None:
    chunk, refused = bytes(MAX_PAYLOAD_BYTES), False
    while not refused:
        refused = not box.publish_chunk(UP_CHUNK, chunk)
    eventually(lambda: box._received.qsize() == 1)  # what ends the wait
    assert box.receive(60.0) is None
    assert box.publish_chunk(UP_CHUNK, chunk)


def test_what_wakes_hides_no_message(hub: Bus, box: Bus) -> None:
    hub._wake()
    assert box.publish_message(UP, b"behind it")
    eventually(lambda: hub._received.qsize() == 2)
    assert hub.receive(0) == Received(UP, b"behind it")
