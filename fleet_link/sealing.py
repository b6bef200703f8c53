"""Sealing: an update readable by the hub's key only, bound to its round, signed by its box.

Reads and writes bytes (MessagePack) and the sealing key's file; HPKE single shot, hybrid post-quantum.
Never leaves the sender to HPKE, which is anonymous: the signature names it.
Source: RFC 9180 (HPKE), MLKEM768-X25519 (X-Wing), HKDF-SHA256, AES-256-GCM.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from msgspec import Meta

from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import Count, Name, RoundPlan
from fleet_link.pki import MAX_CERTIFICATE_BYTES, Identity, Trust, parse_certificate, serial_hex, write_secret

VERSION = 1
DOMAIN = b"wardround update v1\x00"
MLKEM768_SEED_BYTES = 64
MLKEM768_PUBLIC_BYTES = 1184
X25519_BYTES = 32
Blob = bytes | bytearray | memoryview

_suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


@dataclass(frozen=True)
class SealingKey:
    """The hub's key pair. HPKE's own key object gives no bytes back, so the public ones stand beside it."""

    private_key: MLKEM768X25519PrivateKey = field(repr=False)
    public: bytes = field(repr=False)


class UpdateStatement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the box vouches for, as these exact bytes; also HPKE's info, so the ciphertext opens under nothing else."""

    round_id: Name
    plan_digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    sender: Name
    examples: Count


class SealedUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    statement: bytes  # an encoded UpdateStatement
    ciphertext: memoryview  # HPKE: encapsulated key, then AES-256-GCM; of what was decoded, not a copy
    signature: Annotated[bytes, Meta(max_length=80)]
    certificate: Annotated[bytes, Meta(max_length=MAX_CERTIFICATE_BYTES)]  # DER


class OpenedUpdate(NamedTuple):
    sender: str
    examples: int
    payload: bytes
    serial: str  # of the sender's certificate, in hex: the hub asks its registry whether it still counts


_encoder = msgspec.msgpack.Encoder()
_update_decoder = msgspec.msgpack.Decoder(SealedUpdate)
_statement_decoder = msgspec.msgpack.Decoder(UpdateStatement)


def seal_update(payload: bytes, *, identity: Identity, plan: RoundPlan, examples: int) -> bytes:
    """Seal an encoded delta to the plan's sealing key. Raises LinkError if the plan's key is no key."""
    statement = _encoder.encode(
        UpdateStatement(round_id=plan.round_id, plan_digest=plan_digest(plan), sender=identity.name, examples=examples)
    )
    ciphertext = _suite.encrypt(payload, _load_public(plan.sealing_key), info=DOMAIN + statement)
    return _encoder.encode(
        SealedUpdate(
            v=VERSION,
            statement=statement,
            ciphertext=memoryview(ciphertext),
            signature=identity.sign(_signed_bytes(statement, ciphertext, identity.certificate_der)),
            certificate=identity.certificate_der,
        )
    )


def open_update(
    blob: Blob, *, private_key: SealingKey, trust: Trust, sender: str, plan: RoundPlan, now: float
) -> OpenedUpdate:
    """Give what `sender` sealed for this very plan; nothing in it is a view of `blob`. Raises TrustError on anything else."""
    # 1. The outer form.
    sealed = _parse(blob)
    # 2. The certificate: this fleet's CA, valid at `now`, issued to the sender the topic names.
    public_key = trust.check(sealed.certificate, expected_name=sender, now=now)
    # 3. The signature over statement, ciphertext and certificate.
    try:
        signed = _signed_bytes(sealed.statement, sealed.ciphertext, sealed.certificate)
        public_key.verify(sealed.signature, signed, ec.ECDSA(SHA256()))
    except InvalidSignature as error:
        raise TrustError(f"signature of the update from {sender} is wrong") from error
    # 4. Made for this plan by this box.
    statement = _parse_statement(sealed.statement)
    if statement.sender != sender:
        raise TrustError(f"update says it is from {statement.sender}, its topic and certificate say {sender}")
    if statement.round_id != plan.round_id or statement.plan_digest != plan_digest(plan):
        raise TrustError(f"update from {sender} was made for another plan (round {statement.round_id})")
    # 5. Sealed to our key under the same statement.
    try:
        payload = _suite.decrypt(sealed.ciphertext, private_key.private_key, info=DOMAIN + sealed.statement)
    except (InvalidTag, ValueError) as error:
        raise TrustError(
            f"update from {sender} does not open with this hub's sealing key",
            advice="the hub's sealing key changed after the round was planned: start the round again",
        ) from error
    serial = serial_hex(parse_certificate(sealed.certificate))
    return OpenedUpdate(sender, statement.examples, payload, serial)


def plan_digest(plan: RoundPlan) -> bytes:
    """SHA-256 over the plan, without `message_id`: the same plan sent again is the same plan."""
    return hashlib.sha256(_encoder.encode(msgspec.structs.replace(plan, message_id="0" * 32))).digest()


def new_sealing_key(path: Path) -> SealingKey:
    """Make a key pair; keep its 96 secret bytes at `path`, 0600. Raises SiteError if the file exists."""
    mlkem_key, x25519_key = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
    write_secret(path, mlkem_key.private_bytes_raw() + x25519_key.private_bytes_raw())
    return _sealing_key(mlkem_key, x25519_key)


def load_sealing_key(path: Path) -> SealingKey:
    """Raises SiteError if the file is missing or not 96 bytes."""
    try:
        secret = path.read_bytes()
        return _sealing_key(
            MLKEM768PrivateKey.from_seed_bytes(secret[:MLKEM768_SEED_BYTES]),
            X25519PrivateKey.from_private_bytes(secret[MLKEM768_SEED_BYTES:]),
        )
    except (OSError, ValueError) as error:
        raise SiteError(
            f"sealing key {path.name} cannot be read: {error}", advice="restore it from backup; open rounds need it"
        ) from error


def public_bytes(key: SealingKey) -> bytes:
    """What goes into RoundPlan.sealing_key: ML-KEM-768's 1184 bytes, then X25519's 32."""
    return key.public


def _sealing_key(mlkem_key: MLKEM768PrivateKey, x25519_key: X25519PrivateKey) -> SealingKey:
    public = mlkem_key.public_key().public_bytes_raw() + x25519_key.public_key().public_bytes_raw()
    return SealingKey(MLKEM768X25519PrivateKey(mlkem_key, x25519_key), public)


def _load_public(public: bytes) -> MLKEM768X25519PublicKey:
    try:
        return MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:MLKEM768_PUBLIC_BYTES]),
            X25519PublicKey.from_public_bytes(public[MLKEM768_PUBLIC_BYTES:]),
        )
    except ValueError as error:
        raise LinkError(
            f"the plan's sealing key is no MLKEM768-X25519 public key: {error}",
            advice="decline the round, tell the hub",
        ) from error


def _signed_bytes(statement: bytes, ciphertext: Blob, certificate: bytes) -> bytes:
    """Fixed-length digests after the domain: nothing can slide from one part into the other."""
    return DOMAIN + b"".join(hashlib.sha256(part).digest() for part in (statement, ciphertext, certificate))


def _parse(blob: Blob) -> SealedUpdate:
    try:
        sealed = _update_decoder.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"not a sealed update: {error}") from error
    if sealed.v != VERSION:
        raise TrustError(
            f"sealed update of version {sealed.v}, not {VERSION}", advice="update the older of the two sides"
        )
    return sealed


def _parse_statement(statement: bytes) -> UpdateStatement:
    try:
        return _statement_decoder.decode(statement)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError(f"signed statement is malformed: {error}") from error
