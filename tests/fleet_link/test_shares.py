"""Shares: any so many give the secret, fewer give nothing; packets open for one box, from one box, in one cohort."""

from itertools import combinations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_link import shares
from fleet_link.errors import TrustError
from fleet_link.masking import public_bytes
from fleet_link.shares import Route, SharePair

SELF, MASK = b"self secret 16 B", b"mask secret 16 B"
PAIR = SharePair(b"s" * 16, b"m" * 16)
KEYS = {f"box-{number}": X25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 4)}
ROUTE = Route(b"c" * 32, "box-1", "box-2")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_threshold_of_shares_gives_both_secrets(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    threshold = data.draw(st.integers(1, count))
    names = [f"box-{number:02}" for number in range(count)]
    pairs = list(shares.split(SELF, MASK, names, threshold).values())
    chosen = data.draw(st.permutations(range(count)))[:threshold]
    assert shares.combine({number + 1: pairs[number].of_self_secret for number in chosen}) == SELF
    assert shares.combine({number + 1: pairs[number].of_mask_secret for number in chosen}) == MASK


def test_fewer_shares_or_one_wrong_bit_give_another_secret() -> None:
    pairs = list(shares.split(SELF, MASK, list("abcde"), 3).values())
    for chosen in combinations(range(5), 2):
        assert shares.combine({number + 1: pairs[number].of_self_secret for number in chosen}) != SELF
    right = {number + 1: pairs[number].of_self_secret for number in range(3)}
    assert shares.combine(right) == SELF
    assert shares.combine(right | {2: bytes([right[2][0] ^ 1]) + right[2][1:]}) != SELF


def test_a_packet_opens_for_its_addressee_only() -> None:
    packet = shares.seal(PAIR, ROUTE, KEYS["box-1"], public_bytes(KEYS["box-2"]))
    assert len(packet) == 60
    assert shares.open(packet, ROUTE, KEYS["box-2"], public_bytes(KEYS["box-1"])) == PAIR
    assert PAIR.of_self_secret not in packet
    assert packet != shares.seal(PAIR, ROUTE, KEYS["box-1"], public_bytes(KEYS["box-2"]))  # a fresh nonce each time


@pytest.mark.parametrize(
    "route",
    [
        Route(b"d" * 32, "box-1", "box-2"),  # replayed into another cohort or round
        Route(b"c" * 32, "box-2", "box-1"),  # sent back
        Route(b"c" * 32, "box-3", "box-2"),  # as from another
        Route(b"c" * 32, "box-1", "box-3"),  # to another
    ],
)
def test_a_packet_on_another_route_is_refused(route: Route) -> None:
    packet = shares.seal(PAIR, ROUTE, KEYS["box-1"], public_bytes(KEYS["box-2"]))
    for own in KEYS.values():
        for sender in KEYS.values():
            with pytest.raises(TrustError, match="do not open here"):
                shares.open(packet, route, own, public_bytes(sender))


@given(st.integers(0, 60 * 8 - 1))
def test_every_flipped_bit_is_refused(bit: int) -> None:
    packet = bytearray(shares.seal(PAIR, ROUTE, KEYS["box-1"], public_bytes(KEYS["box-2"])))
    packet[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TrustError, match="of box-1 do not open here"):
        shares.open(bytes(packet), ROUTE, KEYS["box-2"], public_bytes(KEYS["box-1"]))


@given(st.binary(max_size=100))
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(TrustError):
        shares.open(junk, ROUTE, KEYS["box-2"], public_bytes(KEYS["box-1"]))


def test_shares_do_not_show_in_a_log_line() -> None:
    assert repr(PAIR) == "SharePair(secret)"
    assert list(PAIR.__rich_repr__()) == []
