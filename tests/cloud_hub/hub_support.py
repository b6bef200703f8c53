"""A hub for tests: real certificates, real database, real broker, free ports.

Writes into the test's own folder.
Never mocks: what a test replaces is the clock.
"""

import shutil
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import paho.mqtt.client as mqtt
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.processes import free_port
from cloud_hub import ca, config, database, https, registry, releases
from cloud_hub.api import create_app
from cloud_hub.ca import Authority, Issuer
from cloud_hub.config import Config, Paths
from cloud_hub.context import Context
from cloud_hub.cutoff import CutOff
from cloud_hub.database import Certificate, Database, Refusal
from cloud_hub.strangers import Strangers
from fleet_link import messages, sealing
from fleet_link.messages import Heartbeat, RoundPlan

needs_mosquitto = pytest.mark.skipif(
    shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None, reason="mosquitto is not installed"
)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def new_csr(key: ec.EllipticCurvePrivateKey, name: str) -> x509.CertificateSigningRequest:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())


def pem(thing: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return thing.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass
class HubFiles:
    """A hub's folder, without its service."""

    config: Config
    database: Database
    authority: Authority

    def write_access(self) -> None:
        registry.write_access(self.database, self.authority, self.config, now=time.time())

    def add_device(self, device: str, site: str = "north") -> None:
        with self.database.writing() as session:
            if session.get(database.Site, site) is None:
                registry.add_site(session, site, now=time.time())
            registry.add_device(session, device, site, now=time.time())

    def device_files(self, folder: Path, device: str, *, days: int = 90, now: float | None = None) -> tuple[Path, Path]:
        """A key and a certificate for the device, known to the registry. Gives (certificate path, key path)."""
        key = new_key()
        certificate = self.authority.issue_device(key.public_key(), device, days=days, now=now or time.time())
        with self.database.writing() as session:
            session.add(
                Certificate(
                    serial=f"{certificate.serial_number:x}",
                    device=device,
                    public_key_sha256=ca.public_key_sha256(key.public_key()),
                    not_after=certificate.not_valid_after_utc.timestamp(),
                    pem=pem(certificate).decode(),
                )
            )
        certificate_path, key_path = folder / f"{device}.pem", folder / f"{device}.key"
        certificate_path.write_bytes(self.authority.chain_pem(certificate))
        key_path.write_bytes(key_pem(key))
        return certificate_path, key_path


def make_hub_files(
    folder: Path, *, mqtt_port: int | None = None, https_port: int | None = None, single_ca: bool = False
) -> HubFiles:
    """CA, server and hub certificate, empty database; `single_ca`: as hubs of before were made."""
    text = config.default_text()
    for section, port in (("broker", mqtt_port or free_port()), ("https", https_port or free_port())):
        text = config.with_value(text, section, "bind", "127.0.0.1")
        text = config.with_value(text, section, "port", port)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hub.toml").write_text(text)
    settings = config.load(folder / "hub.toml")
    paths = settings.paths
    for path in (paths.ca_key.parent, paths.server_key.parent, paths.broker, paths.releases, paths.rounds):
        path.mkdir(parents=True, exist_ok=True)
    then = time.time() - 800 * 86_400.0  # older than what it issued
    authority = ca.create(new_key(), name="test", now=then) if single_ca else two_steps(paths, now=then)
    paths.ca_key.write_bytes(key_pem(authority.issuers[0].key))
    paths.ca_certificate.write_bytes(authority.pem)
    server_key, hub_key = new_key(), new_key()
    names = ["localhost", "127.0.0.1"]
    paths.server_key.write_bytes(key_pem(server_key))
    paths.server_certificate.write_bytes(
        authority.chain_pem(authority.issue_server(server_key.public_key(), names, days=30, now=time.time()))
    )
    paths.hub_key.write_bytes(key_pem(hub_key))
    paths.hub_certificate.write_bytes(
        authority.chain_pem(authority.issue_hub(hub_key.public_key(), days=30, now=time.time()))
    )
    return HubFiles(settings, database.connect(paths.database), authority)


def two_steps(paths: Paths, *, now: float) -> Authority:
    """A root, whose key lies where `hub init` puts it, and its first intermediate."""
    root, key = ca.new_root(new_key(), name="test root", now=now), new_key()
    paths.root_key.write_bytes(key_pem(root.key))
    certificate = ca.new_intermediate(root, key.public_key(), name="test intermediate 1", now=now)
    return Authority(root.certificate, (Issuer(key, certificate),))


ADMIN_TOKEN = "test-admin-token"


class HttpsHub:
    """The hub's HTTPS side alone, on a real socket with TLS; the broker is a list of reloads."""

    def __init__(self, files: HubFiles) -> None:
        self.files = files
        self.config = files.config
        self.now = time.time()
        self.reloads = 0
        self.broker_refuses = True  # a revoked device
        releases.Repository.create(self.config.paths, now=self.now)
        self.config.paths.admin_token.write_text(ADMIN_TOKEN + "\n")
        if not self.config.paths.sealing_key.exists():
            sealing.new_sealing_key(self.config.paths.sealing_key)
        self.context = Context(
            config=self.config,
            database=files.database,
            authority=files.authority,
            strangers=Strangers(files.database, clock=lambda: self.now, seconds=lambda: self.now),
            admin_token=ADMIN_TOKEN,
            reload_broker=self._reload,
            cut_off=lambda device, ordered_at: CutOff(True, self.broker_refuses, 3.3, ("its session was closed",)),
            broker_running=lambda: True,
            clock=lambda: self.now,
        )
        settings = https.settings(
            create_app(self.context),
            self.config.paths,
            host="127.0.0.1",
            port=self.config.https.port,
            log_level="warning",
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        await_true(lambda: self._server.started)

    def _reload(self) -> None:
        self.reloads += 1
        self.files.write_access()

    def client(self, **options: object) -> httpx.Client:
        """Trusts this hub's CA only."""
        trust = ssl.create_default_context(cafile=str(self.config.paths.ca_certificate))
        return httpx.Client(base_url=self.config.url, verify=trust, trust_env=False, **options)  # type: ignore[arg-type]

    def admin(self) -> httpx.Client:
        return self.client(headers={"authorization": f"Bearer {ADMIN_TOKEN}"})

    def refusals(self) -> list[tuple[str, str, str]]:
        with self.files.database.reading() as session:
            return [(row.device, row.what, row.reason) for row in session.query(Refusal)]

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()


class Peer:
    """A plain paho-mqtt connection with a certificate, to see what the broker allows."""

    def __init__(
        self, port: int, ca_path: Path, certificate: Path | None, key: Path | None, *, name: str = "any"
    ) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.subscribed: list[list[int]] = []
        self.published: dict[int, int] = {}
        self.connected = False
        self.disconnects = 0
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
        self.client.tls_set(
            str(ca_path),
            str(certificate) if certificate else None,
            str(key) if key else None,
            tls_version=ssl.PROTOCOL_TLS_CLIENT,
        )
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = lambda _c, _u, message: self.received.append((message.topic, bytes(message.payload)))
        self.client.on_subscribe = lambda _c, _u, _mid, codes, _p: self.subscribed.append([c.value for c in codes])
        self.client.on_publish = lambda _c, _u, mid, code, _p: self.published.__setitem__(mid, code.value)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def _on_connect(
        self, _client: object, _userdata: object, _flags: object, code: object, _properties: object
    ) -> None:
        self.connected = code == 0

    def _on_disconnect(self, *_: object) -> None:
        self.connected = False
        self.disconnects += 1

    def publish(self, topic: str, payload: bytes = b"x") -> int:
        """QoS 1; gives the broker's reason code (0 success, 16 no subscribers, 135 not authorised)."""
        sent = self.client.publish(topic, payload, qos=1)
        await_true(lambda: sent.mid in self.published)
        return self.published[sent.mid]

    def subscribe(self, topic: str) -> int:
        before = len(self.subscribed)
        self.client.subscribe(topic, qos=1)
        await_true(lambda: len(self.subscribed) > before)
        return self.subscribed[-1][0]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def served_serial(port: int, ca_path: Path) -> int:
    """Of the certificate that a TLS port on this machine shows now."""
    trust = ssl.create_default_context(cafile=str(ca_path))
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        trust.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        shown = tls.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def await_true(condition: object, within_s: float = 10.0) -> None:
    """Look again until it holds; fails the test when it never does."""
    until = time.monotonic() + within_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def heartbeat_json(release_version: int, digest: str, *, alarms: tuple[str, ...] = (), **facts: object) -> str:
    values: dict[str, object] = {
        "message_id": "0" * 32,
        "software_version": "0.1.0",
        "bundle_digest": digest,
        "release_version": release_version,
        "provider": "CPUExecutionProvider",
        "uptime_s": 4000,
        "series_read": 212,
        "series_abstained": 9,
        "series_failed": 1,
        "quarantined": 2,
        "reviews": 80,
        "reviews_agreed": 71,
        "outbox_pending": 0,
        "disk_free_bytes": 52 * 1024**3,
        "alarms": alarms,
    }
    return msgspec.json.encode(Heartbeat(**(values | facts))).decode()  # type: ignore[arg-type]


def plan_bytes(round_id: str, base_digest: str) -> bytes:
    plan = RoundPlan(
        message_id="1" * 32,
        round_id=round_id,
        kind="unsafe_open",
        base_digest=base_digest,
        rule="fedavg",
        trainable="all",
        clip_norm=10.0,
        epochs=12,
        learning_rate=0.001,
        min_examples=8,
        seed=7,
        sealing_key=b"k" * 1216,
        deadline_unix_s=2e9,
    )
    return messages.encode(plan)


def seed_fleet(files: HubFiles, *, now: float) -> None:
    """Two hospitals, three boxes and a revoked one; a released, a dropped and a running round; numbers checked by hand.

    Release 2 on held-out reviews: north 6→8 of 10 (box-n1) and 5→9 of 10 (box-n2), south 12→18 of 20: 23→35 of 40.
    """
    for device, site in (("box-n1", "north"), ("box-n2", "north"), ("box-s1", "south"), ("box-old", "south")):
        files.add_device(device, site)
    digests = {1: "a" * 64, 2: "b" * 64, 3: "c" * 64}
    with files.database.writing() as session:
        for device, age_s, alarms in (("box-n1", 3.0, ()), ("box-n2", 8.0, ("the disk is nearly full",))):
            row = session.get_one(database.Device, device)
            row.last_seen_at = now - age_s
            row.heartbeat = heartbeat_json(2, digests[2], alarms=alarms)
        south = session.get_one(database.Device, "box-s1")
        south.last_seen_at, south.heartbeat = now - 7200, heartbeat_json(1, digests[1])
        registry.revoke(session, "box-old", now=now - 86400)
        for round_id, state, reason, age_s in (
            ("round-1", "released", "", 86400.0),
            ("round-2", "dropped", "1 update until the deadline, 2 are needed", 7200.0),
            ("round-3", "uploading", "", 60.0),
        ):
            session.add(
                database.Round(
                    round_id=round_id,
                    state=state,
                    plan=plan_bytes(round_id, digests[1]),
                    min_devices=2,
                    base_digest=digests[1],
                    candidate_digest=digests[2] if state == "released" else None,
                    reason=reason,
                    created_at=now - age_s,
                    changed_at=now - age_s + 40,
                    deadline=now - age_s + 3600,
                )
            )
        session.flush()
        for version, of_round, state in ((1, None, "everyone"), (2, "round-1", "canary")):
            session.add(
                database.Release(
                    release_version=version,
                    bundle_digest=digests[version],
                    round_id=of_round,
                    path=f"releases/{digests[version]}.bundle",
                    size=4_300_000,
                    created_at=now - 90000 / version,
                    state=state,
                )
            )
        session.flush()
        for device, outcome, reason, heldout, before, after in (
            ("box-n1", "activated", "", 10, 6, 8),
            ("box-n2", "activated", "", 10, 5, 9),
            ("box-s1", "refused", "known-answer batch differs by 0.2", 20, 12, 18),
        ):
            session.add(
                database.DeviceRelease(
                    device=device,
                    release_version=2,
                    outcome=outcome,
                    reason=reason,
                    heldout=heldout,
                    heldout_correct_before=before,
                    heldout_correct_after=after,
                    reported_at=now - 3000,
                )
            )
        for device, state, examples, reason, received in (
            ("box-n1", "delivered", 24, "", 1_048_576),
            ("box-n2", "joined", 31, "", 0),
            ("box-s1", "declined", 3, "3 reviewed cases, the plan asks for 8", 0),
        ):
            session.add(
                database.RoundDevice(
                    round_id="round-3",
                    device=device,
                    state=state,
                    examples=examples,
                    reason=reason,
                    bytes_received=received,
                    counted_at=now - 10 if received else None,
                    changed_at=now - 12,
                )
            )
        session.add(
            database.Transfer(
                transfer_id="f" * 32,
                device="box-n2",
                direction="in",
                kind="update",
                subject="round-3",
                sha256="d" * 64,
                size=1_000_000,
                bytes_moved=400_000,
                state="open",
                changed_at=now - 1,
            )
        )
        database.record_refusal(session, device="box-s1", what="message", reason="replayed sequence 12", now=now - 30)
        database.record_refusal(session, device="", what="connection", reason="certificate verify failed", now=now - 9)
