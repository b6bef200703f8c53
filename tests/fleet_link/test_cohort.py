"""The cohort: signed keys, what its digest covers, the graph, what a box refuses, and lists that survive signing."""

import hashlib
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_link import cohort, messages, sealing
from fleet_link.cohort import Judge, Place, PublicKeys, Roster, RoundOf
from fleet_link.errors import LinkError, TrustError
from fleet_link.messages import (
    Agreement,
    Cohort,
    RoundPlan,
    Shares,
    SharesForwarded,
    SignedKeys,
    Survivors,
    SurvivorsSigned,
    Unmask,
)
from tests.fleet_link.mosquitto_support import TestAuthority
from tests.masked_support import AUTHORITY, ID, JUDGE, NOW, changed, flipped, identity, names_of

OF = RoundOf("round-1", b"p" * 32)
PUBLIC = PublicKeys(b"s" * 32, b"m" * 32, b"c" * 32)


def signed(name: str, of: RoundOf = OF, public: PublicKeys = PUBLIC) -> SignedKeys:
    return cohort.sign_keys(identity(name), of, public)


def shown_to(name: str, count: int) -> Cohort:
    keys = {other: signed(other) for other in names_of(count)}
    everyone = cohort.roster(OF, keys)
    return Cohort(
        message_id=ID,
        round_id="round-1",
        names=everyone.names,
        keys_digests=b"".join(everyone.keys_digests),
        neighbours={other: keys[other] for other in cohort.graph(everyone)[name]},
    )


def place(name: str, min_cohort: int = 3) -> Place:
    return Place(name, OF, cohort.keys_digest(signed(name), name, OF), min_cohort)


def synthetic(count: int, of: RoundOf = OF) -> Roster:
    names = tuple(f"box-{number:04}" for number in range(count))
    return Roster(of, names, tuple(hashlib.sha256(name.encode()).digest() for name in names))


# --- keys -----------------------------------------------------------------------------------------


def test_keys_of_a_certified_device_are_accepted() -> None:
    cohort.verify_keys(signed("box-01"), "box-01", OF, JUDGE)


@pytest.mark.parametrize("part", ["share_key", "mask_key", "self_commitment", "signature"])
def test_each_changed_part_of_the_keys_is_refused(part: str) -> None:
    keys = signed("box-01")
    with pytest.raises(TrustError, match="keys of box-01 are not signed by it"):
        cohort.verify_keys(changed(keys, **{part: flipped(getattr(keys, part))}), "box-01", OF, JUDGE)


def test_keys_for_another_round_plan_or_name_are_refused() -> None:
    for of in (RoundOf("round-2", OF.plan_digest), RoundOf("round-1", b"q" * 32)):
        with pytest.raises(TrustError, match="not signed by it for round round-1"):
            cohort.verify_keys(signed("box-01", of), "box-01", OF, JUDGE)
    with pytest.raises(TrustError, match="certificate is of 'box-01'"):
        cohort.verify_keys(signed("box-01"), "box-02", OF, JUDGE)
    borrowed = changed(signed("box-01"), certificate=identity("box-02").certificate_der)
    with pytest.raises(TrustError, match="keys of box-02 are not signed by it"):
        cohort.verify_keys(borrowed, "box-02", OF, JUDGE)


def test_keys_under_another_authority_or_an_expired_certificate_are_refused() -> None:
    stranger = TestAuthority("other CA").issue("box-01")
    with pytest.raises(TrustError, match="certificate of box-01 not accepted"):
        cohort.verify_keys(cohort.sign_keys(stranger, OF, PUBLIC), "box-01", OF, JUDGE)
    with pytest.raises(TrustError, match="not valid"):
        cohort.verify_keys(signed("box-01"), "box-01", OF, Judge(AUTHORITY.trust, NOW + 31 * 86_400))


# --- digest and graph -----------------------------------------------------------------------------


def test_the_digest_covers_round_plan_names_and_keys() -> None:
    one = synthetic(4)
    others = [
        synthetic(5),
        synthetic(4, RoundOf("round-2", OF.plan_digest)),
        synthetic(4, RoundOf("round-1", b"q" * 32)),
        changed(one, keys_digests=(b"x" * 32, *one.keys_digests[1:])),
        changed(one, names=("box-9999", *one.names[1:])),
    ]
    assert len({cohort.digest(each) for each in (one, *others)}) == 6
    assert cohort.digest(one) == cohort.digest(synthetic(4))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 200))
def test_neighbours_are_mutual_sorted_and_as_many_as_the_graph_says(count: int) -> None:
    graph = cohort.graph(synthetic(count))
    for name, neighbours in graph.items():
        assert len(set(neighbours)) == len(neighbours) == min(count - 1, 32)
        assert list(neighbours) == sorted(neighbours)
        assert name not in neighbours
        assert all(name in graph[other] for other in neighbours)


def test_another_cohort_has_another_ring() -> None:
    rings = [cohort.ring(synthetic(100, RoundOf(f"round-{number}", OF.plan_digest))) for number in range(3)]
    assert all(sorted(ring) == sorted(rings[0]) for ring in rings)
    assert rings[0] != rings[1] != rings[2]


@given(st.integers(1, 32))
def test_the_threshold_cannot_be_gathered_twice_without_a_third_of_the_neighbours(neighbours: int) -> None:
    needed = cohort.threshold(neighbours)
    assert 1 <= needed <= neighbours
    for liars in range(math.ceil(neighbours / 3)):  # who sign both lists; each other neighbour signs one
        assert 2 * needed > (neighbours - liars) + 2 * liars
    assert 3 * needed > 2 * neighbours


# --- what a box refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 33, 36])
def test_a_sound_cohort_is_accepted(count: int) -> None:
    everyone = cohort.verify_cohort(shown_to("box-02", count), place("box-02"), JUDGE)
    assert everyone.names == tuple(names_of(count))


def test_a_cohort_of_another_round_or_below_the_minimum_is_refused() -> None:
    shown = shown_to("box-02", 4)
    with pytest.raises(TrustError, match="cohort of round round-2"):
        cohort.verify_cohort(changed(shown, round_id="round-2"), place("box-02"), JUDGE)
    cohort.verify_cohort(shown, place("box-02", min_cohort=4), JUDGE)
    with pytest.raises(TrustError, match="a cohort of 4, this box asks for 5"):
        cohort.verify_cohort(shown, place("box-02", min_cohort=5), JUDGE)


def test_a_cohort_without_this_box_or_with_other_keys_of_it_is_refused() -> None:
    with pytest.raises(TrustError, match="does not have this box with the keys it sent"):
        cohort.verify_cohort(shown_to("box-02", 4), place("box-09"), JUDGE)
    others = Place("box-02", OF, b"x" * 32, 3)
    with pytest.raises(TrustError, match="does not have this box with the keys it sent"):
        cohort.verify_cohort(shown_to("box-02", 4), others, JUDGE)


def test_names_out_of_order_twice_or_without_digests_are_refused() -> None:
    shown = shown_to("box-02", 4)
    for names in (shown.names[::-1], ("box-01", "box-01", "box-02", "box-03")):
        with pytest.raises(TrustError, match="each name once"):
            cohort.verify_cohort(changed(shown, names=names), place("box-02"), JUDGE)
    for digests in (shown.keys_digests[:-32], shown.keys_digests[:-1], b""):
        with pytest.raises(TrustError, match="bytes of key digests for 4 names"):
            cohort.verify_cohort(changed(shown, keys_digests=digests), place("box-02"), JUDGE)


@pytest.mark.parametrize("count", [4, 36])
def test_neighbours_other_than_the_graphs_are_refused(count: int) -> None:
    shown = shown_to("box-02", count)
    missing = dict(list(shown.neighbours.items())[1:])
    extra = {**missing, "box-99": signed("box-99")}
    for neighbours in (missing, extra, {}):
        with pytest.raises(TrustError, match="neighbours differ from the cohort's graph"):
            cohort.verify_cohort(changed(shown, neighbours=neighbours), place("box-02"), JUDGE)


def test_a_neighbour_whose_keys_are_not_its_own_or_not_those_listed_is_refused() -> None:
    shown = shown_to("box-02", 4)
    forged = changed(shown.neighbours["box-03"], mask_key=b"h" * 32)
    with pytest.raises(TrustError, match="keys of box-03 are not signed by it"):
        cohort.verify_cohort(changed(shown, neighbours=shown.neighbours | {"box-03": forged}), place("box-02"), JUDGE)
    second = signed("box-03", public=PublicKeys(b"s" * 32, b"n" * 32, b"c" * 32))
    with pytest.raises(TrustError, match="lists other keys of box-03"):
        cohort.verify_cohort(changed(shown, neighbours=shown.neighbours | {"box-03": second}), place("box-02"), JUDGE)


def test_no_configuration_makes_a_cohort_of_one() -> None:
    assert cohort.smallest_allowed(0, 0) == 2
    assert cohort.smallest_allowed(5, 3) == 5


# --- survivors ------------------------------------------------------------------------------------


def told(active: tuple[str, ...], dropped: tuple[str, ...] = ()) -> Survivors:
    return Survivors(
        message_id=ID,
        round_id="round-1",
        cohort_digest=cohort.digest(synthetic(5)),
        active=active,
        dropped=dropped,
    )


A, B, C = "box-0000", "box-0001", "box-0002"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (told((A, B), (B, C)), f"active and as dropped: {B}"),
        (told((B, A)), "active list is not in order"),
        (told((A, A, B)), "each name once"),
        (told((A, B), (C, C)), "dropped list"),
        (told((A, B, "box-9999")), "not in the cohort: box-9999"),
        (changed(told((A, B)), round_id="round-2"), "another cohort"),
        (changed(told((A, B)), cohort_digest=bytes(32)), "another cohort"),
    ],
)
def test_lists_that_are_not_sound_are_refused(wrong: Survivors, reason: str) -> None:
    with pytest.raises(TrustError, match=reason):
        cohort.check_survivors(wrong, synthetic(5))


def test_a_signature_is_of_these_lists_by_this_device() -> None:
    cohort.check_survivors(told((A, B), (C,)), synthetic(5))
    signature = cohort.sign_survivors(identity("box-01"), told((A, B), (C,)))
    keys = signed("box-01")
    assert cohort.signed_survivors(keys, told((A, B), (C,)), signature)
    for other in (told((A, B)), told((A,), (B, C)), told((A, B, C)), changed(told((A, B), (C,)), round_id="round-2")):
        assert not cohort.signed_survivors(keys, other, signature)
    assert not cohort.signed_survivors(signed("box-02"), told((A, B), (C,)), signature)
    assert not cohort.signed_survivors(keys, told((A, B), (C,)), b"")


# --- messages -------------------------------------------------------------------------------------


def largest() -> list[messages.AnyMessage]:
    """With 32 neighbours and 1000 names; names of a thousand sites are 32 letters at most."""
    names = tuple(f"box-of-a-hospital-department-{number:03}" for number in range(1000))
    near = [name.ljust(63, "x") for name in names[:32]]
    keys = signed("box-01")
    digests = b"d" * 32 * 1000
    return [
        Cohort(
            message_id=ID, round_id="r", names=names, keys_digests=digests, neighbours=dict.fromkeys(names[:32], keys)
        ),
        Shares(message_id=ID, round_id="r", cohort_digest=b"d" * 32, sealed=dict.fromkeys(near, b"p" * 60)),
        SharesForwarded(message_id=ID, round_id="r", cohort_digest=b"d" * 32, sealed=dict.fromkeys(near, b"p" * 60)),
        Survivors(message_id=ID, round_id="r", cohort_digest=b"d" * 32, active=names, dropped=()),
        SurvivorsSigned(message_id=ID, round_id="r", signature=b"s" * 80),
        Agreement(message_id=ID, round_id="r", signatures=dict.fromkeys(near, b"s" * 80)),
        Unmask(message_id=ID, round_id="r", self_shares=dict.fromkeys(near, b"s" * 16), mask_shares={}),
        messages.RoundKeys(message_id=ID, round_id="r", plan_digest=b"p" * 32, keys=keys),
    ]


@pytest.mark.parametrize("message", largest(), ids=lambda message: type(message).__name__)
def test_the_largest_message_fits_and_comes_back(message: messages.AnyMessage) -> None:
    assert messages.decode(messages.encode(message)) == message


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Shares, {"sealed": {"box-1": b"p" * 59}}),
        (Shares, {"sealed": {f"box-{number}": b"p" * 60 for number in range(33)}}),
        (Shares, {"sealed": {"Box 1": b"p" * 60}}),
        (Shares, {"cohort_digest": b"d" * 31}),
        (Agreement, {"signatures": {"box-1": b"s" * 81}}),
        (Unmask, {"self_shares": {"box-1": b"s" * 15}}),
        (Survivors, {"active": [f"box-{number}" for number in range(1001)]}),
        (Cohort, {"keys_digests": b"d" * 32_001}),
    ],
)
def test_each_wrong_size_is_refused(kind: type, wrong: dict[str, object]) -> None:
    sound = next(message for message in largest() if type(message) is kind)
    fields = msgspec.msgpack.decode(messages.encode(sound)) | wrong
    with pytest.raises(LinkError):
        messages.decode(msgspec.msgpack.encode(fields))


def test_plans_of_older_software_decode_and_keep_their_digest(plan: RoundPlan) -> None:
    body = messages.encode(plan)
    assert b"min_cohort" not in body
    assert b"word_bits" not in body
    older = messages.decode(body)
    assert isinstance(older, RoundPlan)
    assert (older.min_cohort, older.word_bits) == (0, 32)
    assert (
        len({sealing.plan_digest(each) for each in (older, changed(older, min_cohort=3), changed(older, word_bits=16))})
        == 3
    )
    with pytest.raises(LinkError):
        messages.decode(messages.encode(changed(plan, word_bits=24)))
