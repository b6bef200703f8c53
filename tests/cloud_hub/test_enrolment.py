"""Enrolment over real TLS: one token buys one certificate, and every other case is refused with its reason."""

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import NameOID

from cloud_hub import registry
from cloud_hub.database import Certificate, Device, Refusal
from fleet_link import pki
from fleet_link.tokens import EnrolmentToken
from tests.cloud_hub.hub_support import HttpsHub, make_hub_files, new_csr, new_key

pytestmark = pytest.mark.slow

ENROL = "/.well-known/est/simpleenroll"
BOOTSTRAP = "/.well-known/wardround/bootstrap"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HttpsHub]:
    files = make_hub_files(tmp_path)
    files.add_device("box-a")
    files.add_device("box-b")
    hub = HttpsHub(files)
    yield hub
    hub.close()


def _token(hub: HttpsHub, device: str = "box-a") -> EnrolmentToken:
    files = hub.files
    with files.database.writing() as session:
        return registry.new_token(session, device, config=files.config, authority=files.authority, now=hub.now)


def _body(key: ec.EllipticCurvePrivateKey, name: str = "box-a") -> bytes:
    return base64.encodebytes(new_csr(key, name).public_bytes(serialization.Encoding.DER))


def _enrol(hub: HttpsHub, auth: tuple[str, str] | None, body: bytes) -> httpx.Response:
    with hub.client() as client:
        return client.post(ENROL, content=body, auth=auth, headers={"content-type": "application/pkcs10"})


def _certificate(answer: httpx.Response) -> x509.Certificate:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/pkcs7-mime")
    [certificate] = pkcs7.load_der_pkcs7_certificates(base64.b64decode(answer.text))
    return certificate


def _certificates_kept(hub: HttpsHub) -> int:
    with hub.files.database.reading() as session:
        return session.query(Certificate).count()


def test_a_token_buys_a_certificate_that_the_fleet_trusts(hub: HttpsHub) -> None:
    token, key = _token(hub), new_key()
    with hub.client() as client:
        shown = pkcs7.load_der_pkcs7_certificates(base64.b64decode(client.get("/.well-known/est/cacerts").text))
        bootstrap = client.get(BOOTSTRAP, auth=("box-a", token.secret)).json()
    [root] = [one for one in shown if pki.fingerprint(one.public_bytes(serialization.Encoding.DER)) == token.ca_sha256]
    assert [root, *pki.intermediates(root, shown)] == hub.files.authority.certificates
    assert (bootstrap["device"], bootstrap["mqtt_port"]) == ("box-a", hub.config.broker.port)
    assert b'"root"' in base64.b64decode(bootstrap["tuf_root"])
    certificate = _certificate(_enrol(hub, ("box-a", token.secret), _body(key)))
    trust = pki.Trust(hub.files.authority.pem)
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert trust.check(der, expected_name="box-a", now=hub.now) == key.public_key()
    assert hub.refusals() == []


def test_the_same_key_asking_again_gets_the_same_certificate_even_later(hub: HttpsHub) -> None:
    token, key = _token(hub), new_key()
    first = _certificate(_enrol(hub, ("box-a", token.secret), _body(key)))
    hub.now += 40 * 86400
    with hub.client() as client:
        assert client.get(BOOTSTRAP, auth=("box-a", token.secret)).status_code == 200
    assert _certificate(_enrol(hub, ("box-a", token.secret), _body(key))) == first
    assert _certificates_kept(hub) == 1


def test_another_key_with_a_used_token_is_refused(hub: HttpsHub) -> None:
    token = _token(hub)
    _certificate(_enrol(hub, ("box-a", token.secret), _body(new_key())))
    answer = _enrol(hub, ("box-a", token.secret), _body(new_key()))
    assert answer.status_code == 403
    assert "was used already" in answer.text
    assert "fleet device token box-a" in answer.text
    assert hub.refusals() == [("box-a", "enrolment", "the token for box-a was used already")]
    assert _certificates_kept(hub) == 1


@pytest.mark.parametrize("path", [ENROL, BOOTSTRAP])
def test_no_or_an_unknown_token_is_refused(hub: HttpsHub, path: str) -> None:
    token = _token(hub)
    method = "POST" if path == ENROL else "GET"
    body = _body(new_key()) if path == ENROL else None
    cases = [
        (None, "no token was shown"),
        (("box-a", "wrong"), "unknown token"),
        (("box-b", token.secret), "unknown token"),
        (("call-0900-attacker", "x"), "unknown token"),
        (("Box\nforged", token.secret), "not the name of a device"),
    ]
    with hub.client() as client:
        for auth, reason in cases:
            answer = client.request(method, path, content=body, auth=auth)
            assert answer.status_code == 401
            assert reason in answer.text
            assert answer.headers["www-authenticate"].startswith("Basic")
        for header in ("Basic !!!", "Basic é", "Basic", "Bearer é", "Basic w6k="):
            broken = client.request(method, path, content=body, headers={"authorization": header.encode()})
            assert broken.status_code == 401, header
    assert set(hub.refusals()) == {
        ("", "enrolment", "no token was shown"),
        ("box-a", "enrolment", "unknown token"),
        ("box-b", "enrolment", "unknown token"),
        ("", "enrolment", "unknown token"),
        ("", "enrolment", "not the name of a device"),
    }
    _certificate(_enrol(hub, ("box-a", token.secret), _body(new_key())))


def test_a_flood_of_strangers_does_not_fill_the_database(hub: HttpsHub) -> None:
    with hub.client() as client:
        for number in range(60):
            answer = client.post(ENROL, content=b"", auth=(f"stranger-{number}", "x"))
            assert answer.status_code == 401
    hub.context.strangers.tell()
    with hub.files.database.reading() as session:
        rows = {(row.device, row.what): row.count for row in session.query(Refusal)}
    assert rows == {("", "enrolment"): 20, ("", "strangers"): 40}
    _certificate(_enrol(hub, ("box-a", _token(hub).secret), _body(new_key())))


def test_nothing_of_a_strangers_is_parsed(hub: HttpsHub) -> None:
    answer = _enrol(hub, ("box-a", "wrong"), b"not a csr")
    assert (answer.status_code, "unknown token" in answer.text) == (401, True)


def test_an_expired_token_is_refused(hub: HttpsHub) -> None:
    token = _token(hub)
    hub.now += hub.config.certificates.token_hours * 3600 + 1
    answer = _enrol(hub, ("box-a", token.secret), _body(new_key()))
    assert answer.status_code == 401
    assert "has expired" in answer.text


def test_a_token_made_void_by_a_newer_one_is_refused(hub: HttpsHub) -> None:
    old = _token(hub)
    _token(hub)
    assert _enrol(hub, ("box-a", old.secret), _body(new_key())).status_code == 401


def test_a_wrong_csr_is_refused_and_does_not_spend_the_token(hub: HttpsHub) -> None:
    token = _token(hub)
    auth = ("box-a", token.secret)
    p384 = new_csr(ec.generate_private_key(ec.SECP384R1()), "box-a").public_bytes(serialization.Encoding.DER)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "box-a")])
    rsa_key = rsa.generate_private_key(65537, 2048)
    rsa_csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(rsa_key, hashes.SHA256())
    good = bytearray(new_csr(new_key(), "box-a").public_bytes(serialization.Encoding.DER))
    good[-1] ^= 1
    for body, status in [
        (_body(new_key(), "box-b"), 403),
        (_body(new_key(), "hub"), 403),
        (base64.b64encode(p384), 400),
        (base64.b64encode(rsa_csr.public_bytes(serialization.Encoding.DER)), 400),
        (base64.b64encode(bytes(good)), 400),
        (base64.b64encode(b"not a csr"), 400),
        (b"\xff not base64", 400),
        (b"", 400),
        (b"A" * 20_000, 413),
    ]:
        answer = _enrol(hub, auth, body)
        assert answer.status_code == status, (body[:20], answer.text)
        assert answer.text.strip()
    assert _certificates_kept(hub) == 0
    _certificate(_enrol(hub, auth, _body(new_key())))


def test_a_revoked_device_is_refused_even_with_its_used_token(hub: HttpsHub) -> None:
    token, key = _token(hub), new_key()
    _certificate(_enrol(hub, ("box-a", token.secret), _body(key)))
    with hub.files.database.writing() as session:
        registry.revoke(session, "box-a", now=hub.now)
    answer = _enrol(hub, ("box-a", token.secret), _body(key))
    assert answer.status_code == 403
    assert "is revoked" in answer.text


def test_enrolling_anew_counts_sequences_anew(hub: HttpsHub) -> None:
    _enrol(hub, ("box-a", _token(hub).secret), _body(new_key()))
    with hub.files.database.writing() as session:
        session.get_one(Device, "box-a").last_sequence = 1 << 60  # its clock was wrong once; then its disk died
    _enrol(hub, ("box-a", _token(hub).secret), _body(new_key()))
    with hub.files.database.reading() as session:
        assert session.get_one(Device, "box-a").last_sequence == 0


def test_enrolling_anew_revokes_the_former_certificate(hub: HttpsHub) -> None:
    first = _certificate(_enrol(hub, ("box-a", _token(hub).secret), _body(new_key())))
    assert hub.reloads == 0
    second = _certificate(_enrol(hub, ("box-a", _token(hub).secret), _body(new_key())))
    assert hub.reloads == 1
    crl = x509.load_pem_x509_crl(hub.config.paths.crl.read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(first.serial_number) is not None
    assert crl.get_revoked_certificate_by_serial_number(second.serial_number) is None
