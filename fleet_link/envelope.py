"""Envelope: every message signed by its sender, for one recipient, at one time, once.

Reads and writes bytes (MessagePack); the bytes that are signed are the bytes that are parsed.
Never looks at a message before its signature is good; reads no clock.
Source: ARCHITECTURE.md, "The link"; ECDSA P-256 with SHA-256 (FIPS 186-5).
"""

import hashlib
from collections.abc import Callable
from typing import Annotated, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from msgspec import Meta

from fleet_link import messages
from fleet_link.errors import TrustError
from fleet_link.messages import AnyMessage, Name
from fleet_link.pki import MAX_CERTIFICATE_BYTES, Identity, Trust, parse_certificate, serial_hex

VERSION = 1
DOMAIN = b"wardround envelope v1\x00"
MAX_CLOCK_DIFFERENCE_S = 15 * 60
MAX_ENVELOPE_BYTES = messages.MAX_MESSAGE_BYTES + MAX_CERTIFICATE_BYTES + 1024
WINDOW = 64  # so many messages of a sender are told apart; one that is older than all of them is too old
RESERVED_AHEAD = 60_000_000  # sequences, a minute's: how often `reserve` writes to the disk


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
    digest: bytes  # of the signed statement: the same message again has the same one
    serial: str  # of the sender's certificate, in hex: the hub asks its registry whether it still counts


class ReplayError(TrustError):
    """A sequence seen before with other content, or too old to tell."""


class RepeatError(ReplayError):
    """The very message that was taken before: MQTT repeats after a reconnect. Drop it, log it."""


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
    """Give the message that `sender` signed for `recipient`, with sequence and digest for the caller's ReplayWindow.

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
    digest = hashlib.sha256(envelope.statement).digest()
    serial = serial_hex(parse_certificate(envelope.certificate))
    return Opened(messages.decode(statement.body), statement.sequence, digest, serial)


class ReplayWindow:
    """Which messages of one sender were taken: the last 64 by their sequence, whatever the gaps between them.

    After a restart pass the highest one kept on disk: everything up to it then counts as seen.
    """

    def __init__(self, highest: int = 0) -> None:
        self.highest = highest
        self._floor = highest  # this one and all below: seen, or too old to tell
        self._digests: dict[int, bytes] = {}  # above the floor, by sequence

    def accept(self, sequence: int, digest: bytes) -> None:
        """Raises RepeatError for the same message again, ReplayError if its sequence was seen or is too old to tell."""
        if self._digests.get(sequence) == digest:
            raise RepeatError(f"message {sequence} came again", advice="normal after a reconnect")
        if sequence <= self._floor or sequence in self._digests:
            raise ReplayError(
                f"sequence {sequence} was seen before (highest {self.highest})",
                advice="once after a restart is normal; again and again: someone replays, or two machines share an identity",
            )
        self._digests[sequence] = digest
        self.highest = max(self.highest, sequence)
        if len(self._digests) > WINDOW:
            self._floor = min(self._digests)
            del self._digests[self._floor]


class Sequence:
    """Rising numbers for one sender: the clock in µs, or one more than the last where the clock stands or goes back.

    `reserve` keeps a number on disk before any up to it is given; `reserved` is the one that the last run kept. So a
    clock that is corrected while we run, or set back before a restart, never leads below what was sent.
    """

    def __init__(self, clock: Callable[[], float], reserved: int, reserve: Callable[[int], None]) -> None:
        self._clock = clock
        self._last = self._reserved = reserved
        self._reserve = reserve

    def next(self) -> int:
        number = max(self._last + 1, int(self._clock() * 1_000_000))
        if number > self._reserved:
            self._reserve(number + RESERVED_AHEAD)
            self._reserved = number + RESERVED_AHEAD
        self._last = number
        return number


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
