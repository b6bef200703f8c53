"""Masks of a masked round: keys from secrets, key streams as words, words as bytes.

Reads and writes arrays in memory, in place; a few hundred KiB of scratch, whatever the size of the update.
Never draws a secret, never decides who is masked against whom.
Source: Bonawitz et al. 2017, "Practical Secure Aggregation"; RFC 7748 (X25519), RFC 5869 (HKDF), SP 800-38A (AES-CTR).
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fleet_link.errors import TrustError

DOMAIN = b"wardround masked round v1"
KEY_BYTES = 32
CHUNK_BYTES = 128 * 1024  # stays in the processor's cache while every mask is added to it
OPEN_STREAMS = 64  # masks applied in one pass over the words

Words = NDArray[np.uint16] | NDArray[np.uint32]
WordBits = Literal[16, 32]

_ZEROS = memoryview(bytes(CHUNK_BYTES))


def bound(purpose: str, *parts: bytes | str) -> bytes:
    """Domain, purpose and parts as bytes in which none can slide into the next."""
    return msgspec.msgpack.encode((DOMAIN, purpose, *parts))


def derive(secret: bytes, purpose: str, *parts: bytes | str) -> bytes:
    """A key of 32 bytes for this purpose and these parts alone."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=bound(purpose, *parts)).derive(secret)


def mask_key(mask_secret: bytes, round_id: str) -> X25519PrivateKey:
    """The private key behind a box's pair masks: what is shared among neighbours is the 16 bytes it comes from."""
    return X25519PrivateKey.from_private_bytes(derive(mask_secret, "mask key", round_id))


def public_bytes(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def agree(own: X25519PrivateKey, other_public: bytes, other_name: str) -> bytes:
    """Raises TrustError where the other's key is a point that would make the secret known to all."""
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other_public))
    except ValueError as error:
        raise TrustError(f"the public key of {other_name} is no X25519 key", advice="inspect that device") from error


def pair_key(own: X25519PrivateKey, own_name: str, other_public: bytes, other_name: str, cohort_digest: bytes) -> bytes:
    """The stream key of the mask that one of a pair adds and the other takes off: the same from both ends.

    The cohort digest binds round, plan and everyone's keys. Raises TrustError on a public key that is none.
    """
    first, second = sorted((own_name, other_name))
    return derive(agree(own, other_public, other_name), "pair mask", cohort_digest, first, second)


def self_key(self_secret: bytes, cohort_digest: bytes, name: str) -> bytes:
    """The stream key of a box's own mask."""
    return derive(self_secret, "self mask", cohort_digest, name)


def self_commitment(self_secret: bytes, round_id: str, name: str) -> bytes:
    """By which the hub knows a rebuilt self secret for the right one; 128 unknown bits hide it."""
    return hashlib.sha256(bound("self commitment", round_id, name, self_secret)).digest()


def apply(words: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the key streams of `plus`, take off those of `minus`, modulo the word, in place. Each key serves once.

    A pass over the words keeps the piece at hand in the cache for all its masks: 3 ms each for 5 M words of 32 bits, 4 ms for one alone.
    """
    signed_keys: list[tuple[np.ufunc, bytes]] = [(np.add, key) for key in plus]
    signed_keys += [(np.subtract, key) for key in minus]
    for begin in range(0, len(signed_keys), OPEN_STREAMS):
        _apply_pass(words, signed_keys[begin : begin + OPEN_STREAMS])


def _apply_pass(words: Words, signed_keys: list[tuple[np.ufunc, bytes]]) -> None:
    streams = [
        (change, Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor())  # one stream for each key: no nonce
        for change, key in signed_keys
    ]
    stream_words = np.empty(CHUNK_BYTES // words.itemsize, words.dtype)
    stream_bytes = stream_words.view(np.uint8).data
    for begin in range(0, len(words), len(stream_words)):
        piece = words[begin : begin + len(stream_words)]
        for change, stream in streams:
            stream.update_into(_ZEROS[: piece.nbytes], stream_bytes[: piece.nbytes])
            change(piece, stream_words[: len(piece)], out=piece)


def zeros(count: int, word_bits: WordBits) -> Words:
    return np.zeros(count, np.dtype("<u2")) if word_bits == 16 else np.zeros(count, np.dtype("<u4"))


def as_words(integers: NDArray[np.signedinteger] | Words, word_bits: WordBits) -> Words:
    """A copy of one vector of integers as unsigned words; negative ones in two's complement.

    Raises ValueError unless they are exactly of the word's size: narrowing here would be a silent wrong sum.
    """
    if integers.ndim != 1 or integers.dtype.kind not in "iu" or integers.itemsize * 8 != word_bits:
        raise ValueError(f"{integers.dtype} of {integers.ndim} axes is no vector of {word_bits}-bit integers")
    words = zeros(len(integers), word_bits)
    words.view(f"<i{words.itemsize}" if integers.dtype.kind == "i" else words.dtype)[:] = integers
    return words


def as_integers(words: Words) -> NDArray[np.int16] | NDArray[np.int32]:
    """The same memory as signed integers."""
    return words.view(np.int16) if words.itemsize == 2 else words.view(np.int32)


def pack(words: Words) -> bytes:
    """Little-endian, nothing else."""
    return words.tobytes()


def unpack(packed: bytes, count: int, word_bits: WordBits) -> Words:
    """A read-only view of the bytes. Raises TrustError unless there are exactly `count` words."""
    if len(packed) * 8 != count * word_bits:
        raise TrustError(
            f"{len(packed)} bytes are not {count} words of {word_bits} bits", advice="inspect the device's software"
        )
    return np.frombuffer(packed, np.dtype("<u2")) if word_bits == 16 else np.frombuffer(packed, np.dtype("<u4"))
