"""Who this box is: its key, its certificate, the fleet's CA with its intermediates, and how it got them (enrolment, renewal).

Reads a one-time token; talks HTTPS to the hub; writes identity.new/ or identity.renewed/, device.pem last, then identity/.
Never sends the private key; never trusts a hub whose root is not the one in the token, nor an intermediate that it has not signed.
Source: EST, RFC 7030 sections 4.1 and 4.2; PKCS #7 certs-only, RFC 5272.
"""

import base64
import binascii
import shutil
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, pkcs7
from msgspec import Meta

from edge_agent.config import Hub
from fleet_link import pki, tokens
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.files import move_durably, write_durably

MAX_REPLY_BYTES = 1024 * 1024
TIMEOUT_S = 20.0
DAY_S = 86400.0
CACERTS = "/.well-known/est/cacerts"
NEW_TOKEN = "ask for a new token on the hub: `fleet device token DEVICE`"  # noqa: S105 - advice, no secret


class HubAddress(msgspec.Struct, frozen=True):
    """identity/link.json."""

    device: str
    hub_url: str
    mqtt_host: str
    mqtt_port: int


class RefusedError(LinkError):
    """The hub is there and says no: to ask again helps nothing."""


class _Bootstrap(msgspec.Struct, frozen=True):
    mqtt_host: Annotated[str, Meta(min_length=1, max_length=253)]
    mqtt_port: Annotated[int, Meta(ge=1, le=65535)]
    tuf_root: Annotated[str, Meta(min_length=1)]
    device: str


@dataclass(frozen=True)
class Folder:
    """Where the parts of an identity lie."""

    path: Path

    @property
    def key(self) -> Path:
        return self.path / "device.key"

    @property
    def certificate(self) -> Path:
        return self.path / "device.pem"

    @property
    def former(self) -> Path:
        """The certificate that was renewed last, without its key: what it has sealed counts until it ends."""
        return self.path / "former.pem"

    @property
    def ca(self) -> Path:
        """The root that the token pinned, then the intermediates that the hub has shown."""
        return self.path / "ca.pem"

    @property
    def address(self) -> Path:
        return self.path / "link.json"

    @property
    def tuf(self) -> Path:
        return self.path / "tuf"

    @property
    def tuf_root(self) -> Path:
        return self.tuf / "root.json"


@dataclass
class Enrolled:
    """Shared by the threads: renewal puts a new `identity` in, each reader sees the former one or the new one whole."""

    folder: Folder
    address: HubAddress
    identity: pki.Identity
    trust: pki.Trust

    @property
    def life(self) -> tuple[float, float]:
        """Start and end of the certificate, unix seconds."""
        certificate = x509.load_der_x509_certificate(self.identity.certificate_der)
        return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()

    def days_left(self, now: float) -> float:
        """Of the certificate; below 0 it has expired."""
        return (self.life[1] - now) / DAY_S

    def address_now(self, hub: Hub) -> HubAddress:
        """Where the hub is: what the site's [hub] says of it, over what the hub said at enrolment."""
        return msgspec.structs.replace(
            self.address,
            hub_url=hub.url.rstrip("/") or self.address.hub_url,
            mqtt_host=urlsplit(hub.url).hostname or self.address.mqtt_host,
            mqtt_port=hub.mqtt_port or self.address.mqtt_port,
        )


def folder(data_dir: Path) -> Folder:
    return Folder(data_dir / "identity")


def draft(data_dir: Path) -> Folder:
    """Where an enrolment grows; whole once it has its certificate."""
    return Folder(data_dir / "identity.new")


def renewed(data_dir: Path) -> Folder:
    """Where a renewal grows: a key, then its certificate; then key and certificate move to `folder`."""
    return Folder(data_dir / "identity.renewed")


def is_enrolled(data_dir: Path) -> bool:
    return folder(data_dir).certificate.exists()


def load(data_dir: Path) -> Enrolled:
    """Raises SiteError when the box is not enrolled or a part of its identity is damaged."""
    here = folder(data_dir)
    if not is_enrolled(data_dir):
        raise SiteError("this box is not enrolled", advice="run `edge-agent enroll TOKEN` with a token from the hub")
    try:
        address = msgspec.json.decode(here.address.read_bytes(), type=HubAddress)
        trust = pki.Trust(here.ca.read_bytes())
        here.tuf_root.stat()
        moving = renewed(data_dir).certificate
        is_half_moved = moving.exists() and not renewed(data_dir).key.exists()
        return Enrolled(
            here, address, pki.load_identity(here.key, moving if is_half_moved else here.certificate), trust
        )
    except (OSError, ValueError) as error:
        advice = "restore the identity folder, or enrol with a new token: `edge-agent enroll --replace TOKEN`"
        raise SiteError(f"this box's identity is damaged: {error}", advice=advice) from error


def enroll(token_text: str, data_dir: Path, *, replace: bool = False) -> Enrolled:
    """Buy a certificate with a one-time token; `replace` puts it in the place of the identity that is there.

    May be repeated with the same token as long as the hub has issued nothing for it.
    Raises SiteError (already enrolled), TrustError (not the token's hub) or LinkError (hub away or token refused).
    """
    token = tokens.parse(token_text)
    settle(data_dir)
    if is_enrolled(data_dir) and not replace:
        raise SiteError(
            f"this box is already enrolled as {load(data_dir).address.device}",
            advice="to give it another identity or move it to another hub stop the agent and run `edge-agent enroll --replace TOKEN`",
        )
    here = draft(data_dir)
    here.tuf.mkdir(mode=0o700, parents=True, exist_ok=True)
    here.path.chmod(0o700)
    # 1. The root, fetched without trust and pinned by the token's fingerprint; with it the intermediates it has signed.
    authorities = _pinned_authorities(token)
    with _client(token.hub_url, _tls(authorities[0]), (token.device, token.secret)) as hub:
        # 2. Where the broker is and the root of releases, over a connection that this CA vouches for.
        bootstrap = _bootstrap(hub, token)
        write_durably(here.ca, pki.pem(authorities), mode=0o644)
        write_durably(here.tuf_root, _base64(bootstrap.tuf_root, "release root"), mode=0o644)
        address = HubAddress(token.device, token.hub_url, bootstrap.mqtt_host, bootstrap.mqtt_port)
        write_durably(here.address, msgspec.json.encode(address), mode=0o644)
        # 3. The certificate, for a key that stays here; a half-done enrolment goes on with its key.
        key = pki.load_private_key(here.key) if here.key.exists() else pki.new_private_key(here.key)
        certificate = _certificate(hub, pki.build_csr(key, token.device), "simpleenroll")
    # 4. Only a certificate of this key, this name and this CA is kept.
    _check_certificate(certificate, key, token.device, authorities)
    write_durably(here.certificate, pki.chain_pem(certificate, authorities), mode=0o644)
    settle(data_dir)
    return load(data_dir)


def settle(data_dir: Path) -> None:
    """Put a whole draft into its place; at start too, for an enrolment or renewal that was killed. Raises SiteError.

    The old identity goes when the new one is whole. With the same root it is the same hub: what this box has seen of its
    releases stays, so that none of them can be rolled back.
    """
    new, old = draft(data_dir), folder(data_dir)
    if not new.certificate.exists():
        _settle_renewed(data_dir)
        return
    try:
        shutil.rmtree(renewed(data_dir).path, ignore_errors=True)  # it is of the identity that goes
        if old.tuf.exists() and _is_same_hub(old, new):
            shutil.rmtree(new.tuf, ignore_errors=True)
            move_durably(old.tuf, new.tuf)
        if old.path.exists():
            shutil.rmtree(old.path)
    except OSError as error:
        raise SiteError(f"the old identity cannot be replaced: {error}", advice=f"check {old.path}") from error
    move_durably(new.path, old.path)


def learn_authorities(enrolled: Enrolled, hub: Hub) -> bool:
    """Take up the intermediates that the hub shows now, before one of them has signed a message. True when there are others.

    What this connection shows counts up to the pinned root alone. Raises LinkError (hub away) or TrustError.
    """
    here = enrolled.folder
    root = _root(here)
    with _client(enrolled.address_now(hub).hub_url, _tls(root)) as asking:
        shown = _certificates(_ask(asking, "GET", CACERTS))
    known = pki.pem([root, *pki.intermediates(root, shown)])
    if known == here.ca.read_bytes():
        return False
    write_durably(here.ca, known, mode=0o644)
    enrolled.trust.refresh(known)
    return True


def root_pem(here: Folder) -> bytes:
    """Which hub this is. Raises TrustError where the file is damaged."""
    return pki.pem([_root(here)])


def renew(enrolled: Enrolled, hub: Hub) -> None:
    """Get a certificate for a new key, as the holder of the present one; both wait in `renewed` until they are proved.

    The key is on disk before the hub hears of it: asked again after a power cut, the hub gives the same certificate.
    Raises LinkError (hub away), RefusedError (a new token is needed) or TrustError (not a certificate for us).
    """
    here = enrolled.folder
    new = renewed(here.path.parent)
    new.path.mkdir(mode=0o700, exist_ok=True)
    new.certificate.unlink(missing_ok=True)  # one that ended before it was proved
    learn_authorities(enrolled, hub)
    authorities = pki.read_authorities(here.ca.read_bytes())
    write_durably(new.ca, pki.pem(authorities), mode=0o644)
    key = _renewal_key(new.key)
    context = _tls(authorities[0])
    context.load_cert_chain(here.certificate, here.key)
    with _client(enrolled.address_now(hub).hub_url, context) as asking:
        certificate = _certificate(asking, pki.build_csr(key, enrolled.identity.name), "simplereenroll")
    _check_certificate(certificate, key, enrolled.identity.name, authorities)
    write_durably(new.certificate, pki.chain_pem(certificate, authorities), mode=0o644)


def waiting(enrolled: Enrolled, now: float) -> Enrolled | None:
    """What `renew` has got, as an identity to connect with; None where there is none, or it is damaged or has ended."""
    new = renewed(enrolled.folder.path.parent)
    if not new.certificate.exists() or not new.key.exists():
        return None
    try:
        found = Enrolled(new, enrolled.address, pki.load_identity(new.key, new.certificate), enrolled.trust)
    except SiteError:
        return None
    return found if now < found.life[1] else None


def take_over(enrolled: Enrolled, proved: Enrolled) -> None:
    """The proved identity from now on. Killed in the middle, `load` finds the new key with its certificate. Raises SiteError."""
    here, new = enrolled.folder, proved.folder
    write_durably(here.former, here.certificate.read_bytes(), mode=0o644)
    move_durably(new.key, here.key)
    _settle_renewed(here.path.parent)
    enrolled.identity = proved.identity


def _renewal_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """That of a renewal which was cut off, or a new one."""
    try:
        return pki.load_private_key(path)
    except SiteError:  # none yet, or it is damaged
        path.unlink(missing_ok=True)
        return pki.new_private_key(path)


def _settle_renewed(data_dir: Path) -> None:
    """A certificate whose key has moved moves too."""
    new = renewed(data_dir)
    if new.certificate.exists() and not new.key.exists():
        move_durably(new.certificate, folder(data_dir).certificate)


def _is_same_hub(old: Folder, new: Folder) -> bool:
    try:
        return root_pem(old) == root_pem(new)
    except (TrustError, OSError):  # what is damaged or gone proves nothing
        return False


def _root(here: Folder) -> x509.Certificate:
    return pki.read_authorities(here.ca.read_bytes())[0]


def _pinned_authorities(token: tokens.EnrolmentToken) -> list[x509.Certificate]:
    """The root, then its intermediates."""
    with httpx.Client(verify=False, timeout=TIMEOUT_S, trust_env=False) as unverified:  # noqa: S501 - pinned below
        shown = _certificates(_ask(unverified, "GET", f"{token.hub_url}{CACERTS}"))
    for certificate in shown:
        if pki.fingerprint(certificate.public_bytes(Encoding.DER)) == token.ca_sha256:
            return [certificate, *pki.intermediates(certificate, shown)]
    raise TrustError(
        f"{token.hub_url} is not the hub that this token is for: it shows another CA",
        advice="check the hub's address; someone may stand between box and hub; " + NEW_TOKEN,
    )


def _tls(root: x509.Certificate) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=root.public_bytes(Encoding.PEM).decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _client(hub_url: str, context: ssl.SSLContext, auth: tuple[str, str] | None = None) -> httpx.Client:
    return httpx.Client(base_url=hub_url, verify=context, auth=auth, timeout=TIMEOUT_S, trust_env=False)


def _bootstrap(hub: httpx.Client, token: tokens.EnrolmentToken) -> _Bootstrap:
    reply = _ask(hub, "GET", "/.well-known/wardround/bootstrap")
    try:
        bootstrap = msgspec.json.decode(reply, type=_Bootstrap)
    except msgspec.DecodeError as error:
        raise LinkError(f"the hub's bootstrap is not understood: {error}", advice="compare the versions") from error
    if bootstrap.device != token.device:
        raise TrustError(f"the hub answered for {bootstrap.device!r}, not for {token.device!r}", advice=NEW_TOKEN)
    return bootstrap


def _certificate(hub: httpx.Client, csr_pem: bytes, operation: str) -> x509.Certificate:
    csr_der = x509.load_pem_x509_csr(csr_pem).public_bytes(Encoding.DER)
    headers = {"content-type": "application/pkcs10", "content-transfer-encoding": "base64"}
    reply = _ask(hub, "POST", f"/.well-known/est/{operation}", content=base64.encodebytes(csr_der), headers=headers)
    return _certificates(reply)[0]


def _check_certificate(
    certificate: x509.Certificate, key: Any, device: str, authorities: list[x509.Certificate]
) -> None:
    ours = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    theirs = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if ours != theirs:
        raise TrustError("the hub's certificate is for another key than this box's", advice=NEW_TOKEN)
    trust = pki.Trust(pki.pem(authorities))
    now = certificate.not_valid_before_utc.timestamp()  # a box whose clock is wrong may still enrol; doctor tells
    trust.check(certificate.public_bytes(Encoding.DER), expected_name=device, now=now)


def _ask(hub: httpx.Client, method: str, url: str, **request: Any) -> bytes:
    """One request. Raises LinkError with what the hub said and what the operator does next."""
    try:
        with hub.stream(method, url, **request) as response:
            reply = b""
            for part in response.iter_bytes():
                reply += part
                if len(reply) > MAX_REPLY_BYTES:
                    raise LinkError("the hub's reply is larger than any reply of a hub", advice="check the address")
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
        advice = (
            "check the hub's address, the firewall and both clocks; nothing is used up, the same can be tried again"
        )
        raise LinkError(f"the hub cannot be reached: {error}", advice=advice) from error
    if response.status_code == httpx.codes.OK:
        return reply
    said = reply[:300].decode("utf-8", "replace").strip() or response.reason_phrase
    if response.status_code in (400, 401, 403, 404, 409, 410):
        raise RefusedError(f"the hub refused ({response.status_code}): {said}", advice=NEW_TOKEN)
    raise LinkError(f"the hub failed ({response.status_code}): {said}", advice="try the same again later")


def _certificates(reply: bytes) -> list[x509.Certificate]:
    try:
        certificates = pkcs7.load_der_pkcs7_certificates(_base64(reply.decode("ascii"), "certificates"))
    except (ValueError, TypeError) as error:
        raise LinkError(f"the hub's certificates are not understood: {error}", advice="check the address") from error
    if not certificates:
        raise LinkError("the hub sent no certificate", advice="check the address")
    return certificates


def _base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise LinkError(f"the hub's {what} are not base64: {error}", advice="check the hub's address") from error
