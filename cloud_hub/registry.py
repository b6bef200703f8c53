"""Sites, devices and enrolment tokens; who may connect, as files for the broker.

Reads and writes sites, devices, tokens, certificates; writes the broker's ACL and revocation list.
Never issues a certificate (enrolment) and never signals the broker (its caller does, after the commit).
Source: ARCHITECTURE.md, "The link": certificate CN = client id = topic segment; revocation is a sequence.
"""

import hashlib
import logging
import secrets
from collections.abc import Iterable

from cryptography.x509 import load_pem_x509_certificate
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cloud_hub.ca import Authority
from cloud_hub.config import Config
from cloud_hub.database import Certificate, Database, Device, Site, Token
from fleet_link.errors import SiteError, TrustError
from fleet_link.files import write_durably
from fleet_link.tokens import EnrolmentToken
from fleet_link.topics import HUB, Channel, Direction, Topic, is_device_id

log = logging.getLogger(__name__)

CERTIFICATE_ALARM_DAYS = 2  # of the shortest that may be configured, a third is left when the box renews it


class NotFoundError(SiteError):
    """No such site, device, round or release."""


# --- sites and devices ----------------------------------------------------------------------------


def add_site(session: Session, site: str, *, now: float) -> Site:
    """Raises SiteError on a bad or taken name."""
    _check_name("site", site)
    if session.get(Site, site) is not None:
        raise SiteError(f"site {site} exists already", advice="fleet site list shows all")
    row = Site(site=site, created_at=now)
    session.add(row)
    session.flush()
    log.info("site %s: added", site)
    return row


def add_device(session: Session, device: str, site: str, *, now: float) -> Device:
    """Raises SiteError on a bad or taken name, NotFoundError when there is no such site."""
    _check_name("device", device)
    if session.get(Site, site) is None:
        raise NotFoundError(f"there is no site {site[:63]}", advice=f"fleet site add {site[:63]}")
    if session.get(Device, device) is not None:
        raise SiteError(f"device {device} exists already", advice=f"a new token for it: fleet device token {device}")
    row = Device(device=device, site=site, created_at=now)
    session.add(row)
    session.flush()
    log.info("device %s: added at site %s", device, site)
    return row


def find_device(session: Session, device: str) -> Device:
    """Raises NotFoundError."""
    row = session.get(Device, device)
    if row is None:
        raise NotFoundError(f"there is no device {device[:63]}", advice="fleet devices shows all")
    return row


def is_active(session: Session, device: str) -> bool:
    """True for a known device that is not revoked."""
    row = session.get(Device, device)
    return row is not None and row.revoked_at is None


def revoke(session: Session, device: str, *, now: float) -> None:
    """The device may say nothing from now on; its certificates and open tokens are void. Twice is once.

    The caller writes the access files and reloads the broker after the commit.
    """
    row = find_device(session, device)
    row.revoked_at = row.revoked_at or now
    log.warning("device %s: revoked", device)
    session.execute(
        update(Certificate).where(Certificate.device == device, Certificate.revoked_at.is_(None)).values(revoked_at=now)
    )
    session.execute(
        update(Token)
        .where(Token.device == device, Token.used_at.is_(None), Token.expires_at > now)
        .values(expires_at=now)
    )


# --- certificates ---------------------------------------------------------------------------------


def check_certificate(session: Session, device: str, serial: str) -> None:
    """Raises TrustError unless this is the device's certificate, neither revoked nor replaced by a later enrolment.

    A good signature alone does not tell: a replaced certificate is valid until it ends. One that the box has renewed
    still counts: what was sealed with it may be on its way.
    """
    row = session.get(Certificate, serial)
    if row is None or row.device != device:
        raise TrustError(
            f"the registry has no certificate {serial} of {device}",
            advice=f"was hub.db restored from an older backup? a new token for the box: fleet device token {device}",
        )
    if row.revoked_at is not None:
        raise TrustError(
            f"certificate {serial} of {device} was revoked or replaced",
            advice="an old box or a copy of its key still speaks: switch it off, or revoke the device",
        )


def certificate_alarm(ends_at: float | None, *, now: float) -> str:
    """What the operator must know of a certificate's end, "" while it is far."""
    if ends_at is None or ends_at - now > CERTIFICATE_ALARM_DAYS * 86400.0:
        return ""
    if ends_at <= now:
        return (
            "the box's certificate has ended: it renews it when it is back; where it cannot, fleet refusals says why,"
            " and a new token helps (fleet device token)"
        )
    return f"the box's certificate ends in {int((ends_at - now) // 3600)} hours and was not renewed: fleet refusals says why"


# --- enrolment tokens -----------------------------------------------------------------------------


def new_token(session: Session, device: str, *, config: Config, authority: Authority, now: float) -> EnrolmentToken:
    """A one-time token; tokens of this device that were not used yet end now. Only a hash is kept."""
    row = find_device(session, device)
    if row.revoked_at is not None:
        raise SiteError(f"device {device} is revoked", advice="add the box under a new name")
    session.execute(
        update(Token)
        .where(Token.device == device, Token.used_at.is_(None), Token.expires_at > now)
        .values(expires_at=now)
    )
    secret = secrets.token_urlsafe(32)
    expires_at = now + config.certificates.token_hours * 3600.0
    session.add(Token(secret_sha256=secret_sha256(secret), device=device, created_at=now, expires_at=expires_at))
    session.flush()
    return EnrolmentToken(device=device, hub_url=config.url, ca_sha256=authority.sha256, secret=secret)


def secret_sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# --- who may connect, for the broker --------------------------------------------------------------


def write_access(database: Database, authority: Authority, config: Config, *, now: float) -> None:
    """Write acl and crl.pem from the tables; each is whole or old, never half."""
    with database.reading() as session:
        active = session.scalars(select(Device.device).where(Device.revoked_at.is_(None)).order_by(Device.device)).all()
        revoked = session.execute(
            select(Certificate.pem, Certificate.revoked_at).where(
                Certificate.revoked_at.is_not(None), Certificate.not_after > now
            )
        ).all()
    listed = [(load_pem_x509_certificate(pem.encode()), revoked_at) for pem, revoked_at in revoked if revoked_at]
    crl = authority.revocation_list(listed, days=config.certificates.crl_days, now=now)
    write_durably(config.paths.crl, crl, mode=0o644)
    write_durably(config.paths.broker / "acl", acl_text(active).encode(), mode=0o644)


def acl_text(devices: Iterable[str]) -> str:
    """Mosquitto's acl_file: a device that is not named here may neither publish nor read.

    Source: mosquitto.conf(5), "acl_file".
    """
    blocks = [_acl_block(HUB, "+", reads=Direction.UP, writes=Direction.DOWN)]
    blocks += [_acl_block(device, device, reads=Direction.DOWN, writes=Direction.UP) for device in devices]
    return "\n".join(blocks)


def _acl_block(user: str, segment: str, *, reads: Direction, writes: Direction) -> str:
    """The topics that fleet_link makes, and no others."""
    lines = [f"user {user}"]
    lines += [f"topic read {Topic(reads, segment, channel)}" for channel in Channel]
    lines += [f"topic write {Topic(writes, segment, channel)}" for channel in Channel]
    return "\n".join(lines) + "\n"


def _check_name(kind: str, name: str) -> None:
    if not is_device_id(name):
        raise SiteError(
            f"{name[:80]!r} cannot be the name of a {kind}",
            advice="a-z, 0-9 and -, at most 63, not starting with -, not 'hub'",
        )
