"""Who this box is: its key, its certificate, the fleet's CA with its intermediates, and how it got them (enrolment, renewal).

Reads a one-time token; talks HTTPS to the hub; writes identity.new/ or identity.renewed/, device.pem last, then identity/.
Never sends the private key; never trusts a hub whose root is not the one in the token, nor an intermediate that it has not signed.
Source: EST, RFC 7030 sections 4.1 and 4.2; PKCS #7 certs-only, RFC 5272.
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from msgspec import Meta

from edge_agent import device_key, est
from edge_agent.config import Hub
from fleet_link import pki, tokens
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.files import move_durably, write_durably

log = logging.getLogger(__name__)

DAY_S = 86400.0


class HubAddress(msgspec.Struct, frozen=True):
    """identity/link.json."""

    device: str
    hub_url: str
    mqtt_host: str
    mqtt_port: int

    def under(self, hub: Hub) -> "HubAddress":
        """Where the hub is now: what the site's [hub] says of it, over what the hub said at enrolment."""
        return msgspec.structs.replace(
            self,
            hub_url=hub.url.rstrip("/") or self.hub_url,
            mqtt_host=urlsplit(hub.url).hostname or self.mqtt_host,
            mqtt_port=hub.mqtt_port or self.mqtt_port,
        )


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


class Life(NamedTuple):
    """Of a certificate, unix seconds."""

    start: float
    end: float

    def days_left(self, now: float) -> float:
        """Below 0 it has expired."""
        return (self.end - now) / DAY_S


@dataclass(frozen=True)
class Known:
    """What can be told of an identity without its key."""

    folder: Folder
    address: HubAddress
    life: Life


@dataclass
class Enrolled:
    """Shared by the threads: renewal puts a new `identity` in, each reader sees the former one or the new one whole."""

    folder: Folder
    address: HubAddress
    identity: pki.Identity
    trust: pki.Trust
    passphrase: bytes | None = field(default=None, repr=False)  # of the key files; see device_key.py

    @property
    def life(self) -> Life:
        return _life(x509.load_der_x509_certificate(self.identity.certificate_der))


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


def known(data_dir: Path) -> Known:
    """Raises SiteError when the box is not enrolled or a part of its identity is damaged."""
    here = folder(data_dir)
    if not is_enrolled(data_dir):
        raise SiteError("this box is not enrolled", advice="run `edge-agent enroll TOKEN` with a token from the hub")
    try:
        address = msgspec.json.decode(here.address.read_bytes(), type=HubAddress)
        certificate = x509.load_pem_x509_certificate(_certificate_in_use(data_dir).read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(error) from error
    return Known(here, address, _life(certificate))


def load(data_dir: Path, passphrase: bytes | None = None) -> Enrolled:
    """Raises SiteError as `known`, and LockedError where the key is encrypted and its passphrase is not given."""
    here, address = folder(data_dir), known(data_dir).address
    device_key.check_open(here.key, passphrase)
    try:
        trust = pki.Trust(here.ca.read_bytes())
        here.tuf_root.stat()
        mine = pki.load_identity(here.key, _certificate_in_use(data_dir), passphrase=passphrase)
    except (OSError, ValueError) as error:
        raise _damaged(error) from error
    return Enrolled(here, address, mine, trust, passphrase)


def protect(data_dir: Path, passphrase: bytes | None) -> None:
    """Encrypt what lies in clear: keys made before there was a passphrase, or by somebody who could not read it."""
    for part in (folder, draft, renewed):
        here = part(data_dir)
        for copy in here.path.glob(f".{here.key.name}-*"):  # of a key that was being written when the power went
            copy.unlink(missing_ok=True)
        try:
            device_key.protect(here.key, passphrase)
        except SiteError as error:
            if part is folder:
                raise
            log.warning(
                "%s of a half-done enrolment or renewal: %s", here.key.name, error
            )  # made anew when it is needed


def enroll(token_text: str, data_dir: Path, *, replace: bool = False, passphrase: bytes | None = None) -> Enrolled:
    """Buy a certificate with a one-time token; `replace` puts it in the place of the identity that is there.

    May be repeated with the same token as long as the hub has issued nothing for it.
    Raises SiteError (already enrolled), TrustError (not the token's hub) or LinkError (hub away or token refused).
    """
    token = tokens.parse(token_text)
    settle(data_dir)
    if is_enrolled(data_dir) and not replace:
        raise SiteError(
            f"this box is already enrolled as {known(data_dir).address.device}",
            advice="to give it another identity or move it to another hub stop the agent and run `edge-agent enroll --replace TOKEN`",
        )
    here = draft(data_dir)
    here.tuf.mkdir(mode=0o700, parents=True, exist_ok=True)
    here.path.chmod(0o700)
    # 1. The root, fetched without trust and pinned by the token's fingerprint; with it the intermediates it has signed.
    authorities = _pinned_authorities(token)
    with est.client(token.hub_url, est.tls(authorities[0]), (token.device, token.secret)) as hub:
        # 2. Where the broker is and the root of releases, over a connection that this CA vouches for.
        bootstrap = _bootstrap(hub, token)
        write_durably(here.ca, pki.pem(authorities), mode=0o644)
        write_durably(here.tuf_root, est.from_base64(bootstrap.tuf_root, "release root"), mode=0o644)
        address = HubAddress(token.device, token.hub_url, bootstrap.mqtt_host, bootstrap.mqtt_port)
        write_durably(here.address, msgspec.json.encode(address), mode=0o644)
        # 3. The certificate, for a key that stays here; a half-done enrolment goes on with its key.
        key = _key_at(here.key, passphrase)
        certificate = est.certificate(hub, pki.build_csr(key, token.device), "simpleenroll")
    # 4. Only a certificate of this key, this name and this CA is kept.
    _check_certificate(certificate, key, token.device, authorities)
    write_durably(here.certificate, pki.chain_pem(certificate, authorities), mode=0o644)
    settle(data_dir)
    protect(data_dir, passphrase)
    return load(data_dir, passphrase)


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
    with est.client(enrolled.address.under(hub).hub_url, est.tls(root)) as asking:
        shown = est.certificates(est.ask(asking, "GET", est.CACERTS))
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
    key = _key_at(new.key, enrolled.passphrase)
    context = est.tls(authorities[0])
    context.load_cert_chain(here.certificate, here.key, enrolled.passphrase or b"")
    with est.client(enrolled.address.under(hub).hub_url, context) as asking:
        certificate = est.certificate(asking, pki.build_csr(key, enrolled.identity.name), "simplereenroll")
    _check_certificate(certificate, key, enrolled.identity.name, authorities)
    write_durably(new.certificate, pki.chain_pem(certificate, authorities), mode=0o644)


def waiting(enrolled: Enrolled, now: float) -> Enrolled | None:
    """What `renew` has got, as an identity to connect with; None where there is none, or it is damaged or has ended."""
    new = renewed(enrolled.folder.path.parent)
    if not new.certificate.exists() or not new.key.exists():
        return None
    try:
        mine = pki.load_identity(new.key, new.certificate, passphrase=enrolled.passphrase)
    except SiteError:
        return None
    found = Enrolled(new, enrolled.address, mine, enrolled.trust, enrolled.passphrase)
    return found if now < found.life.end else None


def take_over(enrolled: Enrolled, proved: Enrolled) -> None:
    """The proved identity from now on. Killed in the middle, `load` finds the new key with its certificate. Raises SiteError."""
    here, new = enrolled.folder, proved.folder
    write_durably(here.former, here.certificate.read_bytes(), mode=0o644)
    move_durably(new.key, here.key)
    _settle_renewed(here.path.parent)
    enrolled.identity = proved.identity


def _key_at(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    """That of an enrolment or renewal which was cut off, or a new one."""
    try:
        return device_key.load(path, passphrase)
    except SiteError:  # none yet, or nothing opens it
        path.unlink(missing_ok=True)
        return pki.new_private_key(path, passphrase=passphrase)


def _certificate_in_use(data_dir: Path) -> Path:
    """The renewed one, where a killed move has left it behind its key."""
    new = renewed(data_dir)
    is_half_moved = new.certificate.exists() and not new.key.exists()
    return new.certificate if is_half_moved else folder(data_dir).certificate


def _life(certificate: x509.Certificate) -> Life:
    return Life(certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp())


def _damaged(error: Exception) -> SiteError:
    advice = "restore the identity folder, or enrol with a new token: `edge-agent enroll --replace TOKEN`"
    return SiteError(f"this box's identity is damaged: {error}", advice=advice)


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
    with httpx.Client(verify=False, timeout=est.TIMEOUT_S, trust_env=False) as unverified:  # noqa: S501 - pinned below
        shown = est.certificates(est.ask(unverified, "GET", f"{token.hub_url}{est.CACERTS}"))
    for certificate in shown:
        if pki.fingerprint(certificate.public_bytes(Encoding.DER)) == token.ca_sha256:
            return [certificate, *pki.intermediates(certificate, shown)]
    raise TrustError(
        f"{token.hub_url} is not the hub that this token is for: it shows another CA",
        advice="check the hub's address; someone may stand between box and hub; " + est.NEW_TOKEN,
    )


def _bootstrap(hub: httpx.Client, token: tokens.EnrolmentToken) -> _Bootstrap:
    reply = est.ask(hub, "GET", "/.well-known/wardround/bootstrap")
    try:
        bootstrap = msgspec.json.decode(reply, type=_Bootstrap)
    except msgspec.DecodeError as error:
        raise LinkError(f"the hub's bootstrap is not understood: {error}", advice="compare the versions") from error
    if bootstrap.device != token.device:
        raise TrustError(f"the hub answered for {bootstrap.device!r}, not for {token.device!r}", advice=est.NEW_TOKEN)
    return bootstrap


def _check_certificate(
    certificate: x509.Certificate, key: Any, device: str, authorities: list[x509.Certificate]
) -> None:
    ours = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    theirs = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if ours != theirs:
        raise TrustError("the hub's certificate is for another key than this box's", advice=est.NEW_TOKEN)
    trust = pki.Trust(pki.pem(authorities))
    now = certificate.not_valid_before_utc.timestamp()  # a box whose clock is wrong may still enrol; doctor tells
    trust.check(certificate.public_bytes(Encoding.DER), expected_name=device, now=now)
