"""Masks: the same from both ends, gone when added and taken off, and nothing of the update left to see."""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_link import masking
from fleet_link.errors import TrustError
from fleet_link.masking import CHUNK_BYTES, OPEN_STREAMS

KEY = bytes(range(32))
WORD_BITS = st.sampled_from([16, 32])


@settings(deadline=None)
@given(
    st.integers(0, 3 * CHUNK_BYTES // 4 + 5),
    WORD_BITS,
    st.lists(st.binary(min_size=32, max_size=32), max_size=3),
    st.integers(0, 2**32),
)
def test_what_is_added_and_taken_off_leaves_every_word_as_it_was(
    count: int, word_bits: masking.WordBits, keys: list[bytes], seed: int
) -> None:
    before = np.random.default_rng(seed).integers(0, 2**word_bits, count, dtype=f"uint{word_bits}")
    words = before.copy()
    masking.apply(words, keys, [])
    masking.apply(words, [], keys[::-1])
    np.testing.assert_array_equal(words, before)
    masking.apply(words, keys, keys)
    np.testing.assert_array_equal(words, before)


@pytest.mark.parametrize("word_bits", [16, 32])
def test_a_mask_is_the_key_stream_in_little_endian_words(word_bits: masking.WordBits) -> None:
    """SP 800-38A, counter from zero: AES-256 of 0, 1, 2… with this key, over the ends of the pieces."""
    count = CHUNK_BYTES * 8 // word_bits * 2 + 3
    blocks = b"".join(number.to_bytes(16, "big") for number in range(count * word_bits // 8 // 16 + 1))
    stream = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor().update(blocks)
    words = masking.zeros(count, word_bits)
    masking.apply(words, [KEY], [])
    assert words.tobytes() == stream[: words.nbytes]


def test_more_masks_than_one_pass_takes() -> None:
    keys = [hashlib.sha256(bytes([number])).digest() for number in range(OPEN_STREAMS + 7)]
    words, one_by_one = masking.zeros(50, 32), masking.zeros(50, 32)
    masking.apply(words, keys, [])
    for key in keys:
        masking.apply(one_by_one, [key], [])
    np.testing.assert_array_equal(words, one_by_one)


def test_both_ends_of_a_pair_have_one_key_that_no_other_pair_cohort_or_purpose_has() -> None:
    first, second = (masking.mask_key(secret * 16, "round-1") for secret in (b"a", b"b"))
    key = masking.pair_key(first, "box-1", masking.public_bytes(second), "box-2", bytes(32))
    assert key == masking.pair_key(second, "box-2", masking.public_bytes(first), "box-1", bytes(32))
    others = {
        masking.pair_key(first, "box-1", masking.public_bytes(second), "box-3", bytes(32)),
        masking.pair_key(first, "box-1", masking.public_bytes(second), "box-2", b"c" * 32),
        masking.pair_key(
            masking.mask_key(b"a" * 16, "round-2"), "box-1", masking.public_bytes(second), "box-2", bytes(32)
        ),
        masking.self_key(b"a" * 16, bytes(32), "box-1"),
        masking.self_key(b"a" * 16, bytes(32), "box-2"),
        masking.self_key(b"a" * 16, b"c" * 32, "box-1"),
    }
    assert len(others | {key}) == 7


def test_a_public_key_that_makes_the_secret_known_to_all_is_refused() -> None:
    own = masking.mask_key(b"a" * 16, "round-1")
    for low_order in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(TrustError, match="of box-2 is no X25519 key"):
            masking.pair_key(own, "box-1", low_order, "box-2", bytes(32))


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=4), st.lists(st.binary(max_size=4), min_size=1, max_size=4))
def test_no_two_lists_of_parts_are_bound_to_the_same_bytes(first: list[bytes], second: list[bytes]) -> None:
    assert (masking.bound("test", *first) == masking.bound("test", *second)) == (first == second)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_signed_integers_come_back_through_words_and_bytes(values: list[int]) -> None:
    integers = np.array(values, np.int32)
    words = masking.as_words(integers, 32)
    packed = masking.pack(words)
    assert len(packed) == 4 * len(values)
    np.testing.assert_array_equal(masking.as_integers(masking.unpack(packed, len(values), 32)), integers)
    assert not np.shares_memory(words, integers)


def test_words_are_little_endian_whatever_the_array_was() -> None:
    assert masking.pack(masking.as_words(np.array([-2], ">i2"), 16)) == b"\xfe\xff"
    assert masking.pack(masking.as_words(np.array([0x0102], "<u2"), 16)) == b"\x02\x01"


@pytest.mark.parametrize(
    "wrong", [np.zeros(3, np.int64), np.zeros(3, np.int16), np.zeros(3, np.float32), np.zeros((3, 1), np.int32)]
)
def test_what_would_be_narrowed_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no vector of 32-bit integers"):
        masking.as_words(wrong, 32)


@pytest.mark.parametrize("word_bits", [16, 32])
def test_bytes_of_another_length_are_refused(word_bits: masking.WordBits) -> None:
    for size in (0, 5 * word_bits // 8 - 1, 5 * word_bits // 8 + 1):
        with pytest.raises(TrustError, match="5 words"):
            masking.unpack(bytes(size), 5, word_bits)


def test_a_commitment_is_of_one_secret_round_and_name() -> None:
    commitments = {
        masking.self_commitment(secret, round_id, name)
        for secret in (b"a" * 16, b"b" * 16)
        for round_id in ("round-1", "round-2")
        for name in ("box-1", "box-2")
    }
    assert len(commitments) == 8
