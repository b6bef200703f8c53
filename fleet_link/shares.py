"""A box's two secrets as shares among its neighbours, each pair of shares sealed to the neighbour that keeps it.

Reads and writes bytes in memory; the polynomials (pycryptodome) and the nonces come from the system's randomness.
Never says who is a neighbour; never gives a share to anyone but the hub's addressee.
Source: Shamir 1979 over GF(2^128) (Crypto.Protocol.SecretSharing); RFC 7748, RFC 5869, AES-256-GCM (SP 800-38D).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fleet_link import masking
from fleet_link.errors import TrustError
from fleet_link.messages import Bytes16, Packet

SECRET_BYTES = 16
NONCE_BYTES = 12


class SharePair(msgspec.Struct, frozen=True):
    """One neighbour's shares of another box's secrets. Exactly one of them is ever told."""

    of_self_secret: Bytes16
    of_mask_secret: Bytes16

    def __repr__(self) -> str:
        return "SharePair(secret)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


@dataclass(frozen=True)
class Route:
    """From whom to whom, in which cohort: a packet opens nowhere else."""

    cohort_digest: bytes
    sender: str
    recipient: str


def split(self_secret: bytes, mask_secret: bytes, neighbours: Sequence[str], threshold: int) -> dict[str, SharePair]:
    """Shares for each of `neighbours`, sorted; share number 1 is the first one's. `threshold` of them give a secret."""
    of_self = Shamir.split(threshold, len(neighbours), self_secret)
    of_mask = Shamir.split(threshold, len(neighbours), mask_secret)
    return {
        name: SharePair(self_share, mask_share)
        for name, (_, self_share), (_, mask_share) in zip(neighbours, of_self, of_mask, strict=True)
    }


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind exactly `threshold` shares, by number from 1. Too few or wrong ones give another 16 bytes."""
    return bytes(Shamir.combine(list(shares.items())))


def seal(pair: SharePair, route: Route, own: X25519PrivateKey, recipient_public: bytes) -> Packet:
    """Raises TrustError on a public key that is none."""
    nonce = os.urandom(NONCE_BYTES)
    shares = pair.of_self_secret + pair.of_mask_secret
    key = _key(route, masking.agree(own, recipient_public, route.recipient))
    return nonce + key.encrypt(nonce, shares, _associated(route))


def open(packet: Packet, route: Route, own: X25519PrivateKey, sender_public: bytes) -> SharePair:
    """Raises TrustError on anything but what `route.sender` sealed for `route.recipient` in this cohort."""
    key = _key(route, masking.agree(own, sender_public, route.sender))
    try:
        shares = key.decrypt(packet[:NONCE_BYTES], packet[NONCE_BYTES:], _associated(route))
    except (InvalidTag, ValueError) as error:
        raise TrustError(
            f"the shares of {route.sender} do not open here",
            advice="they were changed on their way or made for another box or round; this round is refused",
        ) from error
    if len(shares) != 2 * SECRET_BYTES:
        raise TrustError(
            f"{route.sender} sent {len(shares)} bytes in place of two shares", advice="inspect that device"
        )
    return SharePair(shares[:SECRET_BYTES], shares[SECRET_BYTES:])


def _key(route: Route, agreed: bytes) -> AESGCM:
    """Its own for each direction of a pair, so that a packet cannot be sent back to its maker."""
    return AESGCM(masking.derive(agreed, "share packet", route.cohort_digest, route.sender, route.recipient))


def _associated(route: Route) -> bytes:
    return masking.bound("share packet", route.cohort_digest, route.sender, route.recipient)
