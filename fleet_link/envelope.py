"""Envelope: every message signed by its sender, for one recipient, at one time, once.

Reads and writes bytes (MessagePack); the bytes that are signed are the bytes that are parsed.
Never looks at a message before its signature is good; reads no clock.
Source: ARCHITECTURE.md, "The link"; ECDSA P-256 with SHA-256 (FIPS 186-5).
"""

import hashlib
import itertools
from typing import Annotated, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from msgspec import Meta

from fleet_link import messages
from fleet_link.errors import TrustError
from fleet_link.messages import AnyMessage, Name
from fleet_link.pki import MAX_CERTIFICATE_BYTES, Identity, Trust

VERSION = 1
DOMAIN = b"wardround envelope v1\x00"
MAX_CLOCK_DIFFERENCE_S = 15 * 60
MAX_ENVELOPE_BYTES = messages.MAX_MESSAGE_BYTES + MAX_CERTIFICATE_BYTES + 1024
WINDOW = 64  # how far behind the highest sequence a late message may arrive


class Statement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is signed, as these exact bytes."""

    sender: Name
    recipient: Name
    sequence: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    sent_unix_ms: Annotated[int, Meta(ge=0, lt=2**53)]
    body: bytes


class Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    statement: bytes  # an encoded Statement
    signature: Annotated[bytes, Meta(max_length=80)]
    certificate: Annotated[bytes, Meta(max_length=MAX_CERTIFICATE_BYTES)]  # DER


class Opened(NamedTuple):
    message: AnyMessage
    sequence: int


class ReplayError(TrustError):
    """A sequence seen before, or too old to tell. Harmless when MQTT repeats after a reconnect: drop it, log it."""


_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
_statement_decoder = msgspec.msgpack.Decoder(Statement)


def seal(identity: Identity, recipient: str, message: AnyMessage, *, sequence: int, now: float) -> bytes:
    """Sign `message` for `recipient`. Raises LinkError if it would not fit the wire."""
    statement = _encoder.encode(
        Statement(
            sender=identity.name,
            recipient=recipient,
            sequence=sequence,
            sent_unix_ms=round(now * 1000),
            body=messages.encode(message),
        )
    )
    return _encoder.encode(
        Envelope(
            v=VERSION,
            statement=statement,
            signature=identity.sign(_signed_bytes(statement, identity.certificate_der)),
            certificate=identity.certificate_der,
        )
    )


def open(payload: bytes, trust: Trust, *, sender: str, recipient: str, now: float) -> Opened:
    """Give the message that `sender` signed for `recipient`, and its sequence for the caller's ReplayWindow.

    Raises TrustError on anything malformed, forged, misdirected or more than 15 minutes off;
    LinkError if an authentic body is no message this software knows.
    """
    # 1. The outer form.
    envelope = _parse(payload)
    # 2. The certificate: this fleet's CA, valid now, issued to the sender the topic names.
    public_key = trust.check(envelope.certificate, expected_name=sender, now=now)
    # 3. The signature over exactly the bytes that are parsed next.
    try:
        signed = _signed_bytes(envelope.statement, envelope.certificate)
        public_key.verify(envelope.signature, signed, ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise TrustError(
            f"signature of a message from {sender} is wrong", advice="the message was changed on its way; it is refused"
        ) from error
    statement = _parse_statement(envelope.statement)
    # 4. Said by whom, to whom, when.
    _check_statement(statement, sender, recipient, now)
    # 5. Only now the message itself.
    return Opened(messages.decode(statement.body), statement.sequence)


class ReplayWindow:
    """Which sequences of one sender were seen: a bit for each of the last 64.

    After a restart pass the highest one kept on disk: everything up to it then counts as seen.
    """

    def __init__(self, highest: int = 0) -> None:
        self.highest = highest
        self._seen = (1 << WINDOW) - 1  # bit i: sequence highest - i

    def accept(self, sequence: int) -> None:
        """Raises ReplayError if the sequence was seen or is older than the window."""
        ahead = sequence - self.highest
        if ahead > 0:
            # Numbers between the old highest and this one are unseen; a jump wider than the window forgets the rest.
            shifted = self._seen << ahead if ahead < WINDOW else 0
            self._seen = (shifted | 1) & ((1 << WINDOW) - 1)
            self.highest = sequence
            return
        if -ahead >= WINDOW or self._seen >> -ahead & 1:
            raise ReplayError(
                f"sequence {sequence} was seen before (highest {self.highest})",
                advice="once after a reconnect is normal; again and again: someone replays, or two machines share an identity",
            )
        self._seen |= 1 << -ahead


class Sequence:
    """Rising numbers for one sender. Starting from the clock in µs, a restart continues above what was sent before."""

    def __init__(self, start: int) -> None:
        self._numbers = itertools.count(max(1, start))

    @classmethod
    def from_clock(cls, now: float) -> "Sequence":
        return cls(int(now * 1_000_000))

    def next(self) -> int:
        return next(self._numbers)


def _signed_bytes(statement: bytes, certificate: bytes) -> bytes:
    """The certificate is bound too: ECDSA lets anyone write a second valid form, (r, n - s), of the CA's signature."""
    return DOMAIN + hashlib.sha256(certificate).digest() + statement


def _parse(payload: bytes) -> Envelope:
    if len(payload) > MAX_ENVELOPE_BYTES:
        raise TrustError(f"envelope of {len(payload)} bytes exceeds {MAX_ENVELOPE_BYTES}")
    try:
        envelope = _envelope_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"not an envelope: {error}") from error
    if envelope.v != VERSION:
        raise TrustError(f"envelope of version {envelope.v}, not {VERSION}", advice="update the older of the two sides")
    return envelope


def _parse_statement(statement: bytes) -> Statement:
    try:
        return _statement_decoder.decode(statement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(
            f"signed statement is malformed: {error}", advice="update the older of the two sides"
        ) from error


def _check_statement(statement: Statement, sender: str, recipient: str, now: float) -> None:
    if statement.sender != sender:
        raise TrustError(f"message says it is from {statement.sender}, its topic and certificate say {sender}")
    if statement.recipient != recipient:
        raise TrustError(f"message is for {statement.recipient}, not for {recipient}")
    difference_s = statement.sent_unix_ms / 1000 - now
    if abs(difference_s) > MAX_CLOCK_DIFFERENCE_S:
        side = "ahead of" if difference_s > 0 else "behind"
        raise TrustError(
            f"message from {sender} is {abs(difference_s):.0f} s {side} this machine's clock",
            advice="set both clocks (timedatectl set-ntp true): more than 15 minutes apart, messages are refused",
        )
