"""Enrolment over HTTPS: a one-time token buys one certificate, and a certificate the next one, in one transaction.

Reads tokens, devices and certificates; writes certificates, spent tokens, refusals.
Never gives a second certificate for a token, nor for one that is renewed: the same key asking again gets the same.
Source: RFC 7030 (EST) 4.1 cacerts, 4.2.1 simpleenroll, 4.2.2 simplereenroll; RFC 7617 (Basic).
"""

import base64
import binascii
import logging
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cloud_hub import ca, registry, releases
from cloud_hub.context import Context, bounded_body
from cloud_hub.database import Certificate, Device, Token
from cloud_hub.https import shown_certificate
from fleet_link import pki
from fleet_link.errors import TrustError
from fleet_link.topics import is_device_id

log = logging.getLogger(__name__)

CSR_BYTES_MAX = 16 * 1024
DAY_S = 86_400.0


class EnrolmentRefusedError(TrustError):
    """Carries the HTTP status: 401 unknown token or no certificate, 403 not with this one, 400 not a CSR."""

    def __init__(self, status: int, message: str, *, advice: str) -> None:
        super().__init__(message, advice=advice)
        self.status = status


@dataclass(frozen=True)
class Claim:
    """What a box says it is."""

    device: str
    secret: str


def routes(context: Context) -> list[Route]:
    def cacerts(request: Request) -> Response:
        return _pkcs7(*context.authority.certificates)

    def bootstrap(request: Request) -> Response:
        """Where the broker is and which TUF root to start from, for whoever holds a token that is not void."""
        now = context.clock()
        try:
            claim = parse_basic(request.headers.get("authorization", ""))
            with context.database.reading() as session:
                check_token(session, claim, now=now)
        except EnrolmentRefusedError as error:
            return _refused(context, request, error)
        return JSONResponse(
            {
                "device": claim.device,
                "mqtt_host": context.config.broker.host,
                "mqtt_port": context.config.broker.port,
                "tuf_root": base64.b64encode(releases.root_bytes(context.config)).decode(),
            }
        )

    def enrol_body(request: Request, body: bytes) -> Response:
        now = context.clock()
        try:
            claim = parse_basic(request.headers.get("authorization", ""))
            with context.database.reading() as session:
                check_token(session, claim, now=now)  # before anything of a stranger's is parsed
            certificate = enrol(context, claim, *parse_csr(body), now=now)
        except EnrolmentRefusedError as error:
            return _refused(context, request, error)
        return _pkcs7(certificate)

    async def simpleenroll(request: Request) -> Response:
        body = await bounded_body(request, CSR_BYTES_MAX)
        return await run_in_threadpool(enrol_body, request, body)

    def renew_body(request: Request, body: bytes) -> Response:
        now = context.clock()
        shown = shown_certificate(request.scope)
        try:
            former = check_shown(shown, context.authority.trust, context.config.certificates.renew_grace_days, now=now)
            certificate = renew(context, former, *parse_csr(body), now=now)
        except EnrolmentRefusedError as error:
            context.strangers.refused(device=_name_in(shown), what="renewal", reason=str(error))
            return PlainTextResponse(f"{error}; {error.advice}\n", status_code=error.status)
        return _pkcs7(certificate)

    async def simplereenroll(request: Request) -> Response:
        body = await bounded_body(request, CSR_BYTES_MAX)
        return await run_in_threadpool(renew_body, request, body)

    return [
        Route("/.well-known/est/cacerts", cacerts),
        Route("/.well-known/est/simpleenroll", simpleenroll, methods=["POST"]),
        Route("/.well-known/est/simplereenroll", simplereenroll, methods=["POST"]),
        Route("/.well-known/wardround/bootstrap", bootstrap),
    ]


def enrol(
    context: Context, claim: Claim, name: str, public_key: ec.EllipticCurvePublicKey, *, now: float
) -> x509.Certificate:
    """The certificate this token buys for this key. Raises EnrolmentRefusedError; a refused token is not spent.

    A box that enrols anew replaces its former certificate, which is revoked.
    """
    with context.database.writing() as session:
        token = check_token(session, claim, now=now)
        if name != claim.device:
            raise EnrolmentRefusedError(
                403, f"the CSR is for {name[:80]!r}, the token for {claim.device}", advice="use this device's own token"
            )
        if token.certificate_serial is not None:
            return _issued_before(session, token, public_key)
        days = context.config.certificates.device_days
        certificate = context.authority.issue_device(public_key, claim.device, days=days, now=now)
        replaced = _revoke_former(session, claim.device, now)
        row = _row(certificate, public_key, claim.device)
        session.add(row)
        session.flush()
        token.used_at, token.certificate_serial = now, row.serial
        session.get_one(Device, claim.device).last_sequence = 0  # a fresh disk counts anew; the old certificate is out
    if replaced:
        context.reload_broker()
    log.info("device %s enrolled, certificate %s", claim.device, row.serial)
    return certificate


def renew(
    context: Context, former: x509.Certificate, name: str, public_key: ec.EllipticCurvePublicKey, *, now: float
) -> x509.Certificate:
    """The certificate that follows `former` for this key. Raises EnrolmentRefusedError.

    `former` is not revoked by it: what the box has sealed with it may be on its way until it ends. It buys no second one
    for another key: a copy of the box that renews first is found out when the box does.
    """
    device = pki.common_name(former.subject)
    with context.database.writing() as session:
        _check_former(session, device, pki.serial_hex(former))
        if name != device:
            raise EnrolmentRefusedError(
                403,
                f"the CSR is for {name[:80]!r}, the certificate of {device}",
                advice="a box renews its own name only",
            )
        given = _followers(session, former, device)
        if any(row.public_key_sha256 != ca.public_key_sha256(public_key) for row in given):
            raise EnrolmentRefusedError(
                403, f"the certificate of {device} was renewed before, for another key", advice=_new_token(device)
            )
        in_time = [row for row in given if row.not_after > now]
        if in_time:
            return x509.load_pem_x509_certificate(in_time[-1].pem.encode())
        days = context.config.certificates.device_days
        certificate = context.authority.issue_device(public_key, device, days=days, now=now)
        session.add(_row(certificate, public_key, device))
    log.info("device %s renewed its certificate, now %s", device, pki.serial_hex(certificate))
    return certificate


def check_shown(shown: bytes | None, trust: pki.Trust, grace_days: int, *, now: float) -> x509.Certificate:
    """The client certificate of a connection, of this hub's CA and ended `grace_days` ago at most.

    Raises EnrolmentRefusedError.
    """
    if shown is None:
        raise EnrolmentRefusedError(401, "no certificate was shown", advice="the box's certificate, as TLS client")
    try:
        certificate = pki.parse_certificate(shown)
        name = pki.common_name(certificate.subject)
        start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
        trust.check(shown, expected_name=name, now=min(max(now, start), end))
    except TrustError as error:
        raise EnrolmentRefusedError(
            403, str(error), advice="a box shows the certificate that it has from here"
        ) from error
    if now > end + grace_days * DAY_S:
        raise EnrolmentRefusedError(
            403, f"the certificate of {name} ended more than {grace_days} days ago", advice=_new_token(name)
        )
    return certificate


def check_token(session: Session, claim: Claim, *, now: float) -> Token:
    """The claimed device's token: unused and in time, or used (its holder may be asking again)."""
    token = session.get(Token, registry.secret_sha256(claim.secret))
    if token is None or token.device != claim.device:
        raise EnrolmentRefusedError(401, "unknown token", advice=_new_token(claim.device))
    if not registry.is_active(session, claim.device):
        raise EnrolmentRefusedError(
            403, f"device {claim.device} is revoked", advice="add the box under a new name: fleet device add"
        )
    if token.used_at is None and token.expires_at <= now:
        raise EnrolmentRefusedError(401, f"the token for {claim.device} has expired", advice=_new_token(claim.device))
    return token


def parse_basic(header: str) -> Claim:
    """Raises EnrolmentRefusedError unless this is HTTP Basic with device and secret."""
    scheme, _, encoded = header.partition(" ")
    try:
        device, colon, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:  # not ASCII, not base64, not UTF-8
        colon = ""
    if scheme.lower() != "basic" or not colon:
        raise EnrolmentRefusedError(401, "no token was shown", advice="HTTP Basic: device and the token's secret")
    if not is_device_id(device):
        raise EnrolmentRefusedError(401, "not the name of a device", advice="use the token as it was given")
    return Claim(device, secret)


def parse_csr(body: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
    """(CN, key) of base64 DER (RFC 8951) or PEM. Raises EnrolmentRefusedError."""
    try:
        is_pem = body.lstrip().startswith(b"-----BEGIN")
        return pki.read_csr(body if is_pem else base64.b64decode(b"".join(body.split()), validate=True))
    except binascii.Error as error:
        raise EnrolmentRefusedError(400, "the CSR is not in base64", advice="see RFC 7030, 4.2.1") from error
    except TrustError as error:
        raise EnrolmentRefusedError(400, str(error), advice="make key and CSR with edge-agent enroll") from error


def _issued_before(session: Session, token: Token, public_key: ec.EllipticCurvePublicKey) -> x509.Certificate:
    row = session.get_one(Certificate, token.certificate_serial)
    if row.public_key_sha256 != ca.public_key_sha256(public_key) or row.revoked_at is not None:
        raise EnrolmentRefusedError(
            403, f"the token for {token.device} was used already", advice=_new_token(token.device)
        )
    return x509.load_pem_x509_certificate(row.pem.encode())


def _name_in(shown: bytes | None) -> str:
    """For the operator; "" where there is none."""
    try:
        return pki.common_name(pki.parse_certificate(shown).subject) if shown else ""
    except TrustError:
        return ""


def _check_former(session: Session, device: str, serial: str) -> None:
    if not registry.is_active(session, device):
        raise EnrolmentRefusedError(
            403, f"device {device[:63]} is revoked or unknown", advice="add the box under a new name: fleet device add"
        )
    try:
        registry.check_certificate(session, device, serial)
    except TrustError as error:
        raise EnrolmentRefusedError(403, str(error), advice=_new_token(device)) from error


def _followers(session: Session, former: x509.Certificate, device: str) -> list[Certificate]:
    """What was issued to the device after `former`, and not revoked; the oldest first."""
    rows = session.scalars(select(Certificate).where(Certificate.device == device, Certificate.revoked_at.is_(None)))
    issued = [(x509.load_pem_x509_certificate(row.pem.encode()).not_valid_before_utc, row) for row in rows]
    issued = [(at, row) for at, row in issued if at >= former.not_valid_before_utc]
    return [row for _, row in sorted(issued, key=lambda one: one[0]) if row.serial != pki.serial_hex(former)]


def _revoke_former(session: Session, device: str, now: float) -> bool:
    former = session.query(Certificate).filter(Certificate.device == device, Certificate.revoked_at.is_(None)).count()
    session.execute(
        update(Certificate).where(Certificate.device == device, Certificate.revoked_at.is_(None)).values(revoked_at=now)
    )
    return former > 0


def _row(certificate: x509.Certificate, public_key: ec.EllipticCurvePublicKey, device: str) -> Certificate:
    return Certificate(
        serial=pki.serial_hex(certificate),
        device=device,
        public_key_sha256=ca.public_key_sha256(public_key),
        not_after=certificate.not_valid_after_utc.timestamp(),
        pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
    )


def _pkcs7(*certificates: x509.Certificate) -> Response:
    """In no order: PKCS #7 has a set of them."""
    der = pkcs7.serialize_certificates(list(certificates), serialization.Encoding.DER)
    headers = {"Content-Transfer-Encoding": "base64"}
    return Response(
        base64.encodebytes(der), media_type="application/pkcs7-mime; smime-type=certs-only", headers=headers
    )


def _refused(context: Context, request: Request, error: EnrolmentRefusedError) -> Response:
    """Tell the box and the operator why."""
    try:
        device = parse_basic(request.headers.get("authorization", "")).device
    except EnrolmentRefusedError:
        device = ""
    context.strangers.refused(device=device, what="enrolment", reason=str(error))
    headers = {"WWW-Authenticate": 'Basic realm="wardround enrolment"'} if error.status == 401 else {}
    return PlainTextResponse(f"{error}; {error.advice}\n", status_code=error.status, headers=headers)


def _new_token(device: str) -> str:
    return f"ask the hub's operator for a new one: fleet device token {device}"
