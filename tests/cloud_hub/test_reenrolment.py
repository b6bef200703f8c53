"""Renewal over real TLS: a box's certificate buys the next one for a new key, and every other case is refused."""

import base64
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7

from cloud_hub import registry
from cloud_hub.database import Certificate
from fleet_link import pki
from tests.cloud_hub.hub_support import HttpsHub, key_pem, make_hub_files, new_csr, new_key, pem

pytestmark = pytest.mark.slow

RENEW = "/.well-known/est/simplereenroll"
DAY_S = 86_400.0
Files = tuple[Path, Path]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HttpsHub]:
    files = make_hub_files(tmp_path)
    files.add_device("box-a")
    files.add_device("box-b")
    hub = HttpsHub(files)
    yield hub
    hub.close()


@pytest.fixture
def box(hub: HttpsHub, tmp_path: Path) -> Files:
    """Certificate and key of box-a, issued 20 of 30 days ago."""
    return hub.files.device_files(tmp_path, "box-a", days=30, now=hub.now - 20 * DAY_S)


def renew(hub: HttpsHub, shown: Files | None, key: ec.EllipticCurvePrivateKey, name: str = "box-a") -> httpx.Response:
    trust = ssl.create_default_context(cafile=str(hub.config.paths.ca_certificate))
    if shown is not None:
        trust.load_cert_chain(*shown)
    body = base64.encodebytes(new_csr(key, name).public_bytes(serialization.Encoding.DER))
    with httpx.Client(base_url=hub.config.url, verify=trust, trust_env=False) as client:
        return client.post(RENEW, content=body, headers={"content-type": "application/pkcs10"})


def certificate(answer: httpx.Response) -> x509.Certificate:
    assert answer.status_code == 200, answer.text
    [issued] = pkcs7.load_der_pkcs7_certificates(base64.b64decode(answer.text))
    return issued


def keep(folder: Path, issued: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Files:
    (folder / "next.pem").write_bytes(pem(issued))
    (folder / "next.key").write_bytes(key_pem(key))
    return folder / "next.pem", folder / "next.key"


def test_a_certificate_buys_the_next_one_for_a_new_key(hub: HttpsHub, box: Files, tmp_path: Path) -> None:
    key = new_key()
    issued = certificate(renew(hub, box, key))
    der = issued.public_bytes(serialization.Encoding.DER)
    assert pki.Trust(hub.files.authority.pem).check(der, expected_name="box-a", now=hub.now) == key.public_key()
    assert issued.not_valid_after_utc.timestamp() == int(hub.now) + 30 * DAY_S
    with hub.files.database.reading() as session:
        rows = {row.serial: row.revoked_at for row in session.query(Certificate)}
        for serial in rows:
            registry.check_certificate(session, "box-a", serial)  # what was sealed with the former still counts
    assert len(rows) == 2
    assert hub.reloads == 0
    assert hub.refusals() == []
    hub.now += 20 * DAY_S
    assert certificate(renew(hub, keep(tmp_path, issued, key), new_key())) != issued


def test_the_same_key_asking_again_gets_the_same_certificate(hub: HttpsHub, box: Files) -> None:
    key = new_key()
    first = certificate(renew(hub, box, key))
    hub.now += 3600
    assert certificate(renew(hub, box, key)) == first
    hub.now += 31 * DAY_S  # the answer was lost, then the box was away until that one had ended too
    assert certificate(renew(hub, box, key)).serial_number != first.serial_number


def test_a_key_may_be_kept(hub: HttpsHub, box: Files) -> None:
    key = pki.load_private_key(box[1])
    issued = certificate(renew(hub, box, key))
    assert issued != x509.load_pem_x509_certificate(box[0].read_bytes())
    assert certificate(renew(hub, box, key)) == issued


def test_a_renewed_certificate_buys_nothing_for_another_key(hub: HttpsHub, box: Files) -> None:
    """Whoever holds a copy of the box's key and renews first is found out by the box."""
    certificate(renew(hub, box, new_key()))
    answer = renew(hub, box, new_key())
    assert answer.status_code == 403
    assert "fleet device token box-a" in answer.text
    reason = "the certificate of box-a was renewed before, for another key"
    assert hub.refusals() == [("box-a", "renewal", reason)]


def test_an_ended_certificate_renews_within_its_grace_only(hub: HttpsHub, tmp_path: Path) -> None:
    grace = hub.config.certificates.renew_grace_days
    late = hub.files.device_files(tmp_path, "box-a", days=30, now=hub.now - (30 + grace - 1) * DAY_S)
    too_late = hub.files.device_files(tmp_path, "box-b", days=30, now=hub.now - (30 + grace + 1) * DAY_S)
    certificate(renew(hub, late, new_key()))
    answer = renew(hub, too_late, new_key(), "box-b")
    assert answer.status_code == 403
    assert f"ended more than {grace} days ago" in answer.text
    assert [row[:2] for row in hub.refusals()] == [("box-b", "renewal")]


def test_without_a_certificate_it_is_refused_and_all_else_works(hub: HttpsHub) -> None:
    answer = renew(hub, None, new_key())
    assert (answer.status_code, "no certificate was shown" in answer.text) == (401, True)
    assert hub.refusals() == [("", "renewal", "no certificate was shown")]
    with hub.admin() as admin:
        assert admin.get("/api/v1/devices").status_code == 200


def test_a_certificate_opens_no_other_door(hub: HttpsHub, box: Files) -> None:
    trust = ssl.create_default_context(cafile=str(hub.config.paths.ca_certificate))
    trust.load_cert_chain(*box)
    with httpx.Client(base_url=hub.config.url, verify=trust, trust_env=False) as client:
        assert client.get("/api/v1/devices").status_code == 401
        assert client.post("/.well-known/est/simpleenroll", content=b"").status_code == 401


def test_another_authoritys_certificate_does_not_pass_the_handshake(hub: HttpsHub, tmp_path: Path) -> None:
    stranger = make_hub_files(tmp_path / "stranger")
    stranger.add_device("box-a")
    with pytest.raises(httpx.TransportError):
        renew(hub, stranger.device_files(tmp_path, "box-a"), new_key())


def test_what_the_registry_does_not_vouch_for_is_refused(hub: HttpsHub, box: Files, tmp_path: Path) -> None:
    paths = hub.config.paths
    key = new_key()
    unknown = keep(tmp_path, hub.files.authority.issue_device(key.public_key(), "box-a", days=9, now=hub.now), key)
    cases = [
        (unknown, "box-a", "the registry has no certificate"),
        (box, "box-b", "the CSR is for 'box-b', the certificate of box-a"),
        ((paths.hub_certificate, paths.hub_key), "hub", "device hub is revoked or unknown"),
        ((paths.server_certificate, paths.server_key), "localhost", ""),
    ]
    for shown, name, reason in cases:
        try:
            answer = renew(hub, shown, new_key(), name)
        except httpx.TransportError:  # OpenSSL itself refuses a server's certificate as a client's
            assert name == "localhost"
            continue
        assert answer.status_code == 403, name
        assert reason in answer.text
    with hub.files.database.writing() as session:
        registry.revoke(session, "box-a", now=hub.now)
    answer = renew(hub, box, new_key())
    assert (answer.status_code, "is revoked" in answer.text) == (403, True)
    assert "fleet device add" in answer.text


def test_a_certificate_replaced_by_an_enrolment_is_refused(hub: HttpsHub, box: Files) -> None:
    files = hub.files
    with files.database.writing() as session:
        token = registry.new_token(session, "box-a", config=files.config, authority=files.authority, now=hub.now)
    body = base64.encodebytes(new_csr(new_key(), "box-a").public_bytes(serialization.Encoding.DER))
    with hub.client() as client:
        assert (
            client.post("/.well-known/est/simpleenroll", content=body, auth=("box-a", token.secret)).status_code == 200
        )
    answer = renew(hub, box, new_key())
    assert (answer.status_code, "was revoked or replaced" in answer.text) == (403, True)


def test_what_is_no_csr_is_refused(hub: HttpsHub, box: Files) -> None:
    trust = ssl.create_default_context(cafile=str(hub.config.paths.ca_certificate))
    trust.load_cert_chain(*box)
    with httpx.Client(base_url=hub.config.url, verify=trust, trust_env=False) as client:
        for body, status in [(b"", 400), (b"\xff", 400), (base64.b64encode(b"no csr"), 400), (b"A" * 20_000, 413)]:
            assert client.post(RENEW, content=body).status_code == status
