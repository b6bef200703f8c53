"""Enrolment against a working EST server: what is kept, what is refused, and why."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from cryptography.x509.oid import ExtendedKeyUsageOID
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from benchmarks.processes import free_port
from edge_agent import est, identity
from fleet_link import pki
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.tokens import EnrolmentToken
from tests.fleet_link.mosquitto_support import TestAuthority, write_identity

pytestmark = pytest.mark.slow

SECRET = "s" * 32
IDENTITY = ("tuf", "ca.pem", "device.key", "device.pem", "link.json")
ROOT = b'{"signed": "root"}'


@dataclass
class EstTwin:
    """RFC 7030's two calls and the bootstrap; each answer can be made wrong."""

    authority: TestAuthority = field(default_factory=TestAuthority)
    shown_ca: TestAuthority | None = None
    device: str = "box-1"
    refuse: tuple[int, str] | None = None
    issue_for_key: ec.EllipticCurvePrivateKey | None = None
    issue_by: TestAuthority | None = None
    issue_to: str = ""
    fail_after_bootstrap: bool = False
    bootstrap_body: bytes | None = None
    issued: int = 0
    port: int = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/est/cacerts", self.cacerts),
                Route("/.well-known/wardround/bootstrap", self.bootstrap),
                Route("/.well-known/est/simpleenroll", self.simpleenroll, methods=["POST"]),
            ]
        )

    def token(self, ca: TestAuthority | None = None, secret: str = SECRET) -> str:
        pinned = (ca or self.authority).certificate
        ca_sha256 = pki.fingerprint(pinned.public_bytes(Encoding.DER))
        return EnrolmentToken("box-1", f"https://localhost:{self.port}", ca_sha256, secret).text()

    async def cacerts(self, request: Request) -> Response:
        return _pkcs7((self.shown_ca or self.authority).certificate)

    async def bootstrap(self, request: Request) -> Response:
        if request.headers["authorization"] != _basic("box-1", SECRET):
            return PlainTextResponse("unknown token for box-1", 401)
        body = {
            "device": self.device,
            "mqtt_host": "localhost",
            "mqtt_port": 8883,
            "tuf_root": base64.b64encode(ROOT).decode(),
        }
        return Response(json.dumps(body).encode() if self.bootstrap_body is None else self.bootstrap_body)

    async def simpleenroll(self, request: Request) -> Response:
        if self.refuse is not None:
            return PlainTextResponse(self.refuse[1], self.refuse[0])
        name, key = pki.read_csr(base64.b64decode(await request.body()))
        self.issued += 1
        issuer = self.issue_by or self.authority
        return _pkcs7(
            _certify(issuer, self.issue_to or name, self.issue_for_key.public_key() if self.issue_for_key else key)
        )


def _certify(issuer: TestAuthority, name: str, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
    class Holder:
        def public_key(self) -> ec.EllipticCurvePublicKey:
            return key

    issued = issuer.issue(name, key=Holder())  # type: ignore[arg-type]
    return x509.load_der_x509_certificate(issued.certificate_der)


def _basic(device: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{device}:{secret}".encode()).decode()


def _pkcs7(certificate: x509.Certificate) -> Response:
    return Response(base64.encodebytes(pkcs7.serialize_certificates([certificate], Encoding.DER)))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[EstTwin]:
    twin = EstTwin(port=free_port())
    server_identity = twin.authority.issue("server", usages=(ExtendedKeyUsageOID.SERVER_AUTH,), hosts=("localhost",))
    write_identity(tmp_path, server_identity)
    server = uvicorn.Server(
        uvicorn.Config(
            twin.app(),
            port=twin.port,
            host="localhost",
            ssl_certfile=tmp_path / "server.pem",
            ssl_keyfile=tmp_path / "server.key",
            log_level="critical",
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        pass
    yield twin
    server.should_exit = True
    thread.join()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def test_enrolment_keeps_a_whole_identity(hub: EstTwin, data_dir: Path) -> None:
    enrolled = identity.enroll(hub.token(), data_dir)
    assert enrolled.identity.name == "box-1"
    assert (enrolled.address.mqtt_host, enrolled.address.mqtt_port) == ("localhost", 8883)
    assert enrolled.folder.tuf_root.read_bytes() == ROOT
    assert enrolled.folder.key.stat().st_mode & 0o777 == 0o600
    assert enrolled.folder.path.stat().st_mode & 0o777 == 0o700
    again = identity.load(data_dir)
    assert again.identity.certificate_der == enrolled.identity.certificate_der


def test_an_enrolled_box_keeps_its_identity(hub: EstTwin, data_dir: Path) -> None:
    identity.enroll(hub.token(), data_dir)
    with pytest.raises(SiteError, match="already enrolled as box-1"):
        identity.enroll(hub.token(), data_dir)
    assert hub.issued == 1


def seen_releases(enrolled: identity.Enrolled) -> Path:
    """What python-tuf keeps of the metadata that it has verified."""
    trusted = enrolled.folder.tuf / "trusted"
    trusted.mkdir()
    (trusted / "timestamp.json").write_bytes(b"version 7")
    return trusted / "timestamp.json"


def test_a_certificate_renewed_by_the_same_hub_keeps_what_was_seen_of_its_releases(
    hub: EstTwin, data_dir: Path
) -> None:
    before = identity.enroll(hub.token(), data_dir)
    seen = seen_releases(before)
    after = identity.enroll(hub.token(), data_dir, replace=True)
    assert after.identity.certificate_der != before.identity.certificate_der
    assert seen.read_bytes() == b"version 7"
    assert after.folder.tuf_root.read_bytes() == ROOT
    assert not identity.draft(data_dir).path.exists()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_same_hub_is_known_by_its_root_alone(hub: EstTwin, data_dir: Path, is_damaged: bool) -> None:
    """Its intermediates come and go; what cannot be read proves nothing, and does not keep from enrolling anew."""
    before = identity.enroll(hub.token(), data_dir)
    seen = seen_releases(before)
    further = b"" if is_damaged else before.folder.ca.read_bytes()
    before.folder.ca.write_bytes(further + (b"half" if is_damaged else TestAuthority("next").pem))
    identity.enroll(hub.token(), data_dir, replace=True)
    assert seen.exists() is not is_damaged


def test_another_hub_begins_with_its_own_root(hub: EstTwin, data_dir: Path) -> None:
    """As if this box had come from another hub: CA, release root and what was seen are that one's."""
    old = TestAuthority("old")
    before = identity.enroll(hub.token(), data_dir)
    before.folder.ca.write_bytes(old.pem)
    before.folder.tuf_root.write_bytes(b"old root")
    seen = seen_releases(before)
    after = identity.enroll(hub.token(), data_dir, replace=True)
    assert after.folder.ca.read_bytes() == hub.authority.pem
    assert after.folder.tuf_root.read_bytes() == ROOT
    assert not seen.exists()


def test_a_replacement_that_fails_leaves_the_old_identity(hub: EstTwin, data_dir: Path) -> None:
    before = identity.enroll(hub.token(), data_dir)
    hub.refuse = (403, "the token for box-1 was used already")
    with pytest.raises(LinkError):
        identity.enroll(hub.token(), data_dir, replace=True)
    assert identity.load(data_dir).identity.certificate_der == before.identity.certificate_der


@pytest.mark.parametrize("gone", [(), ("tuf",), ("tuf", "ca.pem"), ("tuf", "device.pem"), tuple(IDENTITY)])
def test_a_replacement_killed_at_its_end_is_finished_at_the_next_start(
    hub: EstTwin, data_dir: Path, tmp_path: Path, gone: tuple[str, ...]
) -> None:
    old = identity.enroll(hub.token(), data_dir).folder.path
    seen_releases(identity.load(data_dir))
    shutil.copytree(old, tmp_path / "old")
    after = identity.enroll(hub.token(), data_dir, replace=True)
    old.rename(
        identity.draft(data_dir).path
    )  # killed before the first step: the draft is whole, the old one still there
    shutil.copytree(tmp_path / "old", old)
    for name in gone:
        shutil.rmtree(old / name) if (old / name).is_dir() else (old / name).unlink()
    for _ in range(2):
        identity.settle(data_dir)
    assert identity.load(data_dir).identity.certificate_der == after.identity.certificate_der
    assert (old / "tuf" / "trusted" / "timestamp.json").read_bytes() == b"version 7"
    assert not identity.draft(data_dir).path.exists()


def test_a_hub_with_another_ca_is_refused_before_the_secret_is_sent(hub: EstTwin, data_dir: Path) -> None:
    with pytest.raises(TrustError, match="another CA"):
        identity.enroll(hub.token(ca=TestAuthority("elsewhere")), data_dir)
    assert not identity.is_enrolled(data_dir)


def test_a_hub_that_shows_the_right_ca_but_cannot_use_it_is_refused(hub: EstTwin, data_dir: Path) -> None:
    real = TestAuthority("real")
    hub.shown_ca = real  # copied from the real hub; the TLS certificate is still the impostor's
    with pytest.raises(LinkError, match="cannot be reached"):
        identity.enroll(hub.token(ca=real), data_dir)
    assert hub.issued == 0


def test_an_unknown_token(hub: EstTwin, data_dir: Path) -> None:
    with pytest.raises(LinkError, match="unknown token") as caught:
        identity.enroll(hub.token(secret="x" * 32), data_dir)
    assert "fleet device" in caught.value.advice


def test_a_used_token_is_explained(hub: EstTwin, data_dir: Path) -> None:
    hub.refuse = (403, "the token for box-1 was used already")
    with pytest.raises(LinkError, match=r"refused \(403\): the token for box-1 was used already") as caught:
        identity.enroll(hub.token(), data_dir)
    assert "new token" in caught.value.advice
    assert not identity.is_enrolled(data_dir)


def test_a_half_done_enrolment_goes_on_with_the_same_token_and_key(hub: EstTwin, data_dir: Path) -> None:
    hub.refuse = (503, "starting")
    with pytest.raises(LinkError, match="503") as caught:
        identity.enroll(hub.token(), data_dir)
    assert "the same again" in caught.value.advice
    key = identity.draft(data_dir).key.read_bytes()
    hub.refuse = None
    identity.enroll(hub.token(), data_dir)
    assert identity.folder(data_dir).key.read_bytes() == key


@pytest.mark.parametrize("wrong", ["key", "issuer", "name"])
def test_a_certificate_that_is_not_ours_is_not_kept(hub: EstTwin, data_dir: Path, wrong: str) -> None:
    hub.issue_for_key = ec.generate_private_key(ec.SECP256R1()) if wrong == "key" else None
    hub.issue_by = TestAuthority("other") if wrong == "issuer" else None
    hub.issue_to = "box-2" if wrong == "name" else ""
    with pytest.raises(TrustError):
        identity.enroll(hub.token(), data_dir)
    assert not identity.is_enrolled(data_dir)


def test_a_bootstrap_for_another_device_is_refused(hub: EstTwin, data_dir: Path) -> None:
    hub.device = "box-2"
    with pytest.raises(TrustError, match="box-2"):
        identity.enroll(hub.token(), data_dir)


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"device": "box-1", "mqtt_host": "h", "mqtt_port": 70000, "tuf_root": "e30="}']
)
def test_a_bootstrap_that_is_none(hub: EstTwin, data_dir: Path, body: bytes) -> None:
    hub.bootstrap_body = body
    with pytest.raises(LinkError, match="not understood"):
        identity.enroll(hub.token(), data_dir)


def test_a_reply_without_end_is_cut_off(hub: EstTwin, data_dir: Path) -> None:
    hub.bootstrap_body = b" " * (est.MAX_REPLY_BYTES + 1)
    with pytest.raises(LinkError, match="larger"):
        identity.enroll(hub.token(), data_dir)


def test_no_hub(data_dir: Path) -> None:
    twin = EstTwin(port=free_port())
    with pytest.raises(LinkError, match="cannot be reached") as caught:
        identity.enroll(twin.token(), data_dir)
    assert "the same can be tried again" in caught.value.advice


def test_a_token_that_is_none(data_dir: Path) -> None:
    with pytest.raises(LinkError, match="not an enrolment token"):
        identity.enroll("wr1.abc", data_dir)


def test_not_enrolled(data_dir: Path) -> None:
    with pytest.raises(SiteError, match="not enrolled"):
        identity.load(data_dir)


@pytest.mark.parametrize("part", ["ca.pem", "link.json", "device.key", "tuf/root.json"])
def test_a_damaged_identity_is_said(hub: EstTwin, data_dir: Path, part: str) -> None:
    folder = identity.enroll(hub.token(), data_dir).folder.path
    (folder / part).unlink()
    with pytest.raises(SiteError):
        identity.load(data_dir)
