"""Bus: one MQTT 5 connection over mutual TLS 1.3, used by box and hub alike.

Reads messages into a bounded queue; writes messages (QoS 1) and chunks (QoS 0); reconnects by itself.
Never queues what a broker that is away would have to take later: the durable outbox above resends.
Source: MQTT 5.0; RFC 8446 (TLS 1.3); measurements in ARCHITECTURE.md, "The link".
"""

import contextlib
import logging
import queue
import random
import socket
import ssl
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTMessageInfo, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fleet_link.errors import LinkError, SiteError
from fleet_link.topics import Topic, parse

log = logging.getLogger(__name__)

MAX_PACKET_BYTES = 128 * 1024
MAX_PAYLOAD_BYTES = MAX_PACKET_BYTES - 256  # room for the topic and MQTT's header
MAX_QUEUED_MESSAGES = 64
MAX_QUEUED_CHUNKS = 32
MAX_RECEIVED = 256
MAX_RECONNECT_S = 60.0
STOP_S = 2.0


@dataclass(frozen=True)
class BusConfig:
    host: str  # checked against the broker's certificate
    port: int
    name: str  # client id = certificate CN = topic segment
    ca_path: Path
    certificate_path: Path
    key_path: Path
    key_passphrase: bytes | None = field(default=None, repr=False)
    keepalive_s: int = 30
    queued_messages_max: int = MAX_QUEUED_MESSAGES


class Received(NamedTuple):
    topic: Topic
    payload: bytes


class Bus:
    """Start, then publish and receive from any thread. `start` may be called again after `stop` (new certificate)."""

    def __init__(self, config: BusConfig, subscriptions: list[str]) -> None:
        self.connected = False  # the broker accepted this identity and every subscription
        self.last_error = ""  # why not, with advice; empty while connected
        self._config = config
        self._subscriptions = subscriptions
        self._received: queue.Queue[Received | None] = queue.Queue(MAX_RECEIVED)  # None: receive returns
        self._stopping = threading.Event()
        self._down = threading.Event()
        self._chunks: deque[MQTTMessageInfo] = deque()
        self._chunks_lock = threading.Lock()
        self._sent_since_refusal: int | None = None  # packets, since a chunk was not taken
        self._failures = 0
        self._explained = False  # this attempt's failure already has its reason
        self._client: Client | None = None

    def start(self) -> None:
        """Connect in the background. Raises SiteError if CA, certificate or key cannot be used."""
        context = _tls_context(self._config)
        client = Client(CallbackAPIVersion.VERSION2, client_id=self._config.name, protocol=MQTTv5)
        client.tls_set_context(context)
        client.max_queued_messages_set(self._config.queued_messages_max)
        if self._config.queued_messages_max > MAX_QUEUED_MESSAGES:
            # Not paho's 20: an acknowledgement waits behind all that comes in, and with a whole fleet that is much.
            client.max_inflight_messages_set(self._config.queued_messages_max)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        self._stopping.clear()
        with self._chunks_lock:
            self._chunks.clear()  # a former client's will never be gone
        self._client = client
        client.connect_async(
            self._config.host, self._config.port, self._config.keepalive_s, clean_start=True, properties=properties
        )
        client.loop_start()

    def stop(self) -> None:
        """Say goodbye and end the network thread. A broker that hangs is left after 2 s."""
        client, self._client = self._client, None
        if client is None:
            return
        self._stopping.set()
        self._down.clear()
        client.disconnect()
        sock = client.socket()
        if sock is not None and not self._down.wait(STOP_S):
            _shut(sock)
        client.loop_stop()
        self.connected = False

    def publish_message(self, topic: Topic, payload: bytes) -> bool:
        """QoS 1. False when away or the queue is full: nothing was kept, send it again later.

        Raises LinkError if the payload is larger than any broker would take.
        """
        client = self._ready(payload)
        return client is not None and client.publish(str(topic), payload, qos=1).rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def publish_chunk(self, topic: Topic, payload: bytes) -> bool:
        """QoS 0. False when away or 32 chunks are waiting for the socket (back-pressure): `receive` returns once half went.

        Raises LinkError if the payload is larger than any broker would take.
        """
        client = self._ready(payload)
        if client is None:
            return False
        with self._chunks_lock:
            while self._chunks and _is_gone(self._chunks[0]):
                self._chunks.popleft()
            if len(self._chunks) >= MAX_QUEUED_CHUNKS:
                self._sent_since_refusal = 0
                return False
            info = client.publish(str(topic), payload, qos=0)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return False
            self._chunks.append(info)
        return True

    def receive(self, timeout_s: float) -> Received | None:
        """The next message in order of arrival, or None after `timeout_s`, or where chunks can be sent again."""
        try:
            received = self._received.get(timeout=timeout_s) if timeout_s > 0 else self._received.get_nowait()
            while received is None:
                received = self._received.get_nowait()
        except queue.Empty:
            return None
        return received

    def _ready(self, payload: bytes) -> Client | None:
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise LinkError(f"payload of {len(payload)} bytes exceeds {MAX_PAYLOAD_BYTES}: send it in chunks")
        return self._client if self.connected else None

    def _wake(self) -> None:
        with contextlib.suppress(queue.Full):  # then it does not wait
            self._received.put_nowait(None)

    # --- called by paho's network thread --------------------------------------------------------------

    def _on_socket_open(self, client: Client, userdata: Any, sock: Any) -> None:
        # 64 KiB messages: 1.4 MiB/s with default sockets, 124 MiB/s with TCP_NODELAY (ARCHITECTURE.md).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._explained = False

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._fail(f"the broker refused {self._config.name}: {reason}", "check that this device is not revoked")
            return
        client.subscribe([(subscription, 1) for subscription in self._subscriptions])

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            self._fail(f"the broker refused a subscription: {refused[0]}", "check the broker's access list")
            _shut(client.socket())  # not disconnect(): paho would then stay away for good
            return
        self._failures = 0
        self.last_error = ""
        self.connected = True
        log.info("connected to %s:%d as %s", self._config.host, self._config.port, self._config.name)

    def _on_connect_fail(self, client: Client, userdata: Any) -> None:
        # paho calls this inside its own `except`: the reason is not passed, but still there.
        self._fail(*_explain(sys.exc_info()[1]))
        self._back_off(client)

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        was_connected, self.connected = self.connected, False
        self._down.set()
        if self._stopping.is_set():
            return
        if was_connected:
            self._fail(f"connection lost: {reason}", "the network or the broker went away; it is tried again")
        elif not self._explained:
            self._fail(
                f"the broker closed the connection: {reason}",
                "if this repeats: the certificate may be revoked or expired, or the name is in use twice",
            )
        self._back_off(client)

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        try:
            received = Received(parse(message.topic), bytes(message.payload))
        except (LinkError, UnicodeDecodeError) as error:
            log.warning("message dropped: %s", error)
            return
        # A full queue holds the network thread, so TCP slows the broker down; nothing is dropped here.
        while not self._stopping.is_set():
            try:
                self._received.put(received, timeout=0.2)
                return
            except queue.Full:
                continue

    def _on_publish(
        self, client: Client, userdata: Any, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        sent = self._sent_since_refusal
        if sent is None:
            return
        is_half_gone = sent + 1 >= MAX_QUEUED_CHUNKS // 2
        self._sent_since_refusal = None if is_half_gone else sent + 1
        if is_half_gone:
            self._wake()

    def _back_off(self, client: Client) -> None:
        """Half to whole of 1, 2, 4 … 60 s: a fleet does not come back in one instant. paho waits from min to max."""
        ceiling_s = min(MAX_RECONNECT_S, 2.0**self._failures)
        self._failures = min(self._failures + 1, 10)
        delay_s = ceiling_s * random.uniform(0.5, 1.0)  # noqa: S311 (not a secret)
        client.reconnect_delay_set(delay_s, delay_s)  # type: ignore[arg-type]  # paho waits fractions too

    def _fail(self, what: str, advice: str) -> None:
        error = f"{what} ({advice})"
        if error != self.last_error:
            log.warning("link to %s:%d: %s", self._config.host, self._config.port, error)
        self.last_error = error
        self._explained = True


def _tls_context(config: BusConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks chain and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cafile=config.ca_path)
        # b"" where there is none: without any OpenSSL would ask for it on the terminal.
        context.load_cert_chain(config.certificate_path, config.key_path, config.key_passphrase or b"")
    except (OSError, ssl.SSLError) as error:
        raise SiteError(
            f"certificate files of {config.name} cannot be used: {error}", advice="enrol this machine again"
        ) from error
    return context


def _is_gone(info: MQTTMessageInfo) -> bool:
    """True once the chunk is in the socket, or lost with its connection (paho marks both)."""
    return info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS or info.is_published()


def _shut(sock: Any) -> None:
    """End a connection; paho's network thread notices. Nothing to do where it is closed already."""
    with contextlib.suppress(OSError, AttributeError):
        sock.shutdown(socket.SHUT_RDWR)


def _explain(error: BaseException | None) -> tuple[str, str]:
    match error:
        case ssl.SSLCertVerificationError():
            return f"the broker's certificate is not accepted: {error.verify_message}", (
                "host name, clock or CA do not fit: check [hub] url and the clock, or enrol again"
            )
        case ssl.SSLError():
            return f"no TLS 1.3 with the broker: {error.reason or error}", "check that the port is the hub's MQTT port"
        case ConnectionRefusedError():
            return "nothing listens at the broker's port", "check that the hub runs and the port is right"
        case socket.gaierror():
            return f"the broker's host name does not resolve: {error.strerror}", "check [hub] url and DNS"
        case TimeoutError():
            return "the broker does not answer in time", "check the network and the firewall (outbound TCP)"
        case _:
            return f"no connection: {error}", "check the network"
