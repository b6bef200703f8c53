"""A revoked box is off, and that it is so is observed at the broker, not concluded.

Connects to the broker under the box's name, with a certificate that lives in memory only; reads the broker's log.
Never trusts the reload: it takes the name over, so the box's session ends, and tries to speak until that is refused.
Source: MQTT 5.0, 3.1.4 (session taken over) and 3.4.2.1 (not authorised); ARCHITECTURE.md, "The link".
"""

import os
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from cloud_hub.ca import Authority
from cloud_hub.config import Config
from fleet_link.topics import Channel, Direction, Topic

NOT_AUTHORISED = 0x87
GIVE_UP_S = 5.0
ANSWER_S = 0.5  # to one message; after that the name is taken over again
LIFE_DAYS = 1  # of the certificate, whose key is gone at the end of the call


@dataclass(frozen=True)
class CutOff:
    """What the broker showed."""

    was_connected: bool  # it had a session of this box, and ended it
    refuses: bool  # it refused a message under the box's name
    after_ms: float  # from the operator's order to that refusal
    broker_said: tuple[str, ...]  # lines of its log


def cut_off(config: Config, authority: Authority, device: str, *, ordered_at: float) -> CutOff:
    """End the box's session and see that nothing of it is taken any more. After the reload, which may still be going on.

    `ordered_at` is of time.monotonic. `refuses` stays False where the broker takes what is said under the box's name, or
    does not answer, for GIVE_UP_S.
    """
    until = time.monotonic() + GIVE_UP_S
    log = _Log(config.paths.broker / "mosquitto.log")
    refuses = False
    with _certificate(authority, device) as context:
        while not refuses and time.monotonic() < until:
            refuses = _Session(context, device).is_refused(config.broker_here, config.broker.port)
    after_ms = (time.monotonic() - ordered_at) * 1000.0
    said = [line for line in log.new_lines() if f"Client {device} already connected" in line]
    return CutOff(bool(said), refuses, round(after_ms, 1), tuple(said))


class _Session:
    """One connection under the box's name: it ends the one that the box has."""

    def __init__(self, context: ssl.SSLContext, device: str) -> None:
        self._topic = str(Topic(Direction.UP, device, Channel.MESSAGE))
        self._over = threading.Event()
        self._refused = False
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=device, protocol=MQTTv5)
        self._client.tls_set_context(context)
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        self._client.on_disconnect = lambda *_: self._over.set()

    def is_refused(self, host: str, port: int) -> bool:
        """True when the broker said "not authorised" to a message while this session stood."""
        try:
            self._client.connect(host, port)
        except OSError:  # the broker starts anew just now
            time.sleep(0.02)
            return False
        self._client.loop_start()
        self._over.wait(ANSWER_S)
        refused = self._refused
        self._client.disconnect()
        self._client.loop_stop()
        return refused

    def _on_connect(self, client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure or client.publish(self._topic, b"", qos=1).rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._over.set()

    def _on_publish(self, _client: Client, _userdata: Any, _mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._refused = reason.value == NOT_AUTHORISED
        self._over.set()


class _Log:
    """What the broker writes from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> list[str]:
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._start if self._start <= self._path.stat().st_size else 0)  # it is cut when it gets long
            return file.read().decode("utf-8", "replace").splitlines()
        return []


@contextmanager
def _certificate(authority: Authority, device: str) -> Iterator[ssl.SSLContext]:
    """The TLS of a client of this name. The registry does not know its certificate: no message signed by it would count."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue_device(key.public_key(), device, days=LIFE_DAYS, now=time.time())
    pem = authority.chain_pem(certificate) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.create_default_context(cadata=authority.pem.decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    memory = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{memory}")
        yield context
    finally:
        os.close(memory)
