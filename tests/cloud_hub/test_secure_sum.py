"""The hub's side of a masked round: the sum to the last bit, who may be away when, and shares that lie."""

import contextlib
import hashlib
import re
from collections.abc import Collection

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub import secure_sum
from cloud_hub.secure_sum import MaskedSum
from edge_agent import masking as box
from fleet_link import cohort, shares
from fleet_link.cohort import Roster
from fleet_link.errors import LinkError, TrustError
from fleet_link.messages import Survivors, SurvivorsSigned, Unmask, encode
from tests.masked_support import ID, Round, changed, flipped, identity, names_of, plain_sum, plan, round_of

STAGES = ("keys", "shares", "upload", "agree", "unmask")


# --- the sum --------------------------------------------------------------------------------------


@st.composite
def absences(draw: st.DrawFn) -> tuple[list[str], dict[str, set[str]]]:
    """A few boxes, and of most rounds one to three who stay away from some stage on."""
    names = names_of(draw(st.integers(2, 9)))
    leaves = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(STAGES), max_size=3))
    return names, {stage: {name for name, last in leaves.items() if last == stage} for stage in STAGES}


def reached(of_whom: Collection[str], by_whom: Collection[str], needed: int) -> bool:
    return all(len(set(by_whom) - {name}) >= needed for name in of_whom)


def outcome(names: list[str], away: dict[str, set[str]]) -> set[str] | None:
    """Whose sum the rules of the protocol give while everyone is everyone's neighbour; None when it must fail."""
    keyed = set(names) - away["keys"]
    needed = cohort.threshold(len(keyed) - 1)
    sharing = keyed - away["shares"]
    active = sharing - away["upload"]
    signers = active - away["agree"]
    tellers = signers - away["unmask"]
    enough = min(len(keyed), len(sharing), len(active)) >= 2 and reached(sharing, sharing, needed)
    if enough and all(reached(sharing, those, needed) for those in (active, signers, tellers)):
        return active
    return None


@settings(max_examples=40, deadline=None)
@given(absences(), st.sampled_from([16, 32]))
def test_the_sum_is_that_of_the_survivors_or_nothing(
    case: tuple[list[str], dict[str, set[str]]], word_bits: int
) -> None:
    names, away = case
    one = Round(names, plan(word_bits=word_bits))
    expected = outcome(names, away)
    if expected is None:
        with pytest.raises(LinkError):
            run(one, away)
    else:
        np.testing.assert_array_equal(run(one, away), plain_sum(expected, word_bits))


def run(one: Round, away: dict[str, set[str]]) -> np.ndarray:
    one.keys(away["keys"]).shares(away["shares"]).upload(away["upload"]).agree(away["agree"])
    return one.sum(one.unmask(away["unmask"]))


def test_the_sum_over_a_sparse_graph_with_absences_at_every_stage() -> None:
    names = names_of(40)
    away = dict(zip(STAGES, ({names[0]}, {names[7]}, {names[13], names[14]}, {names[21]}, {names[39]}), strict=True))
    one = Round(names)
    total = run(one, away)
    assert {len(neighbours) for neighbours in one.circle.graph.values()} == {32}
    np.testing.assert_array_equal(total, plain_sum(set(names) - {names[0], names[7], names[13], names[14]}))


def test_the_sum_is_spent_on_nobody_before_the_masks_are_off() -> None:
    one = Round(names_of(5)).keys().shares().upload()
    total = MaskedSum(23, 32)
    for upload in one.uploads.values():
        total.add(upload)
    assert not np.array_equal(total.words.view(np.int32), plain_sum(one.uploads))


@pytest.mark.parametrize("upload", [b"", b"x" * 91, b"x" * 93, b"x" * 46])
def test_an_upload_of_another_size_is_refused_whole(upload: bytes) -> None:
    total = MaskedSum(23, 32)
    with pytest.raises(TrustError, match="23 words"):
        total.add(upload)
    assert not total.words.any()


# --- who is missing -------------------------------------------------------------------------------


def test_too_few_keys_shares_or_uploads_are_told_with_names() -> None:
    names = names_of(6)
    one = Round(names, plan(min_cohort=5))
    with pytest.raises(LinkError, match="4 boxes sent keys, 5 are needed"):
        one.keys(away=names[:2])
    one.keys()
    with pytest.raises(LinkError, match=r"4 of 6 boxes sent shares.*missing: box-01, box-02"):
        one.shares(away=names[:2])
    one = Round(names, plan(min_cohort=5)).keys().shares()
    with pytest.raises(LinkError, match="4 of 6 boxes uploaded, 5 are needed; missing: box-05, box-06"):
        one.upload(away=names[4:])


def test_shares_short_are_counted_and_the_missing_named() -> None:
    names = names_of(8)  # 5 of 7 neighbours are needed
    one = Round(names).keys().shares().upload().agree()
    given_ = one.unmask(away=names[5:])
    with pytest.raises(LinkError, match=r"1 shares short for box-01.*missing: box-06, box-07, box-08"):
        secure_sum.rebuild(one.circle, one.told, given_)
    with pytest.raises(LinkError, match="missing: box-04, box-05, box-06, box-07, box-08"):
        Round(names).keys().shares().upload().agree(away=names[3:])


def test_who_has_too_few_neighbours_is_left_out_until_all_have_enough() -> None:
    """Of 60 on a ring, 22 of 32 neighbours are needed: the middle of eleven silent ones has 21, the others still enough."""
    circle = Round(names_of(60)).keys().circle
    ring = cohort.ring(circle.roster)
    silent = {ring[step] for step in (-16, -15, -3, -2, -1, 1, 2, 3, 14, 15, 16)}
    staying = secure_sum.settle_shares(circle, set(ring) - silent)
    assert staying == tuple(sorted(set(ring) - silent - {ring[0]}))
    assert secure_sum.settle_shares(circle, staying) == staying
    run_of_eleven = set(ring[:11])  # those beside it fall, then those beside them
    with pytest.raises(LinkError, match="49 of 60 boxes sent shares; with enough neighbours 0"):
        secure_sum.settle_shares(circle, set(ring) - run_of_eleven)


def test_a_cohort_that_no_message_can_carry_is_refused() -> None:
    keys = Round(names_of(2)).keys().circle.keys["box-01"]
    of = round_of(plan())
    many = {f"box-{number:04}": keys for number in range(1000)}
    shown = secure_sum.cohort_for(secure_sum.form_circle(of, many, 2), "box-0500", message_id=ID)
    assert len(shown.names) == 1000
    assert len(shown.neighbours) == 32
    assert len(encode(shown)) < 96 * 1024
    with pytest.raises(LinkError, match="too large"):
        secure_sum.form_circle(of, many | {"one-more": keys}, 2)
    with pytest.raises(LinkError, match="too large"):
        secure_sum.form_circle(of, {name.ljust(63, "x"): keys for name in many}, 2)
    secure_sum.check_fits(dict.fromkeys(many, len(keys.certificate)))
    with pytest.raises(LinkError, match="too large"):
        secure_sum.check_fits(dict.fromkeys(many, len(keys.certificate) + 2048))


# --- boxes that lie -------------------------------------------------------------------------------


def lying(one: Round, given_: dict[str, Unmask], liars: Collection[str]) -> dict[str, Unmask]:
    """As given, but every share of the liars has a wrong bit."""

    def wrong(shares: dict[str, bytes]) -> dict[str, bytes]:
        return {name: flipped(share) for name, share in shares.items()}

    return given_ | {
        name: changed(
            given_[name], self_shares=wrong(given_[name].self_shares), mask_shares=wrong(given_[name].mask_shares)
        )
        for name in liars
    }


@pytest.mark.parametrize("liars", [["box-01"], ["box-04", "box-08"]])
def test_the_sum_is_right_in_spite_of_a_lying_minority(liars: list[str]) -> None:
    one = Round(names_of(10)).keys().shares().upload(away={"box-10"}).agree()  # 7 of 9 neighbours are needed
    given_ = one.unmask()
    rebuilt = secure_sum.rebuild(one.circle, one.told, lying(one, given_, liars[:1]))
    assert {teller for _, teller in rebuilt.wrong_shares} == set(liars[:1])
    np.testing.assert_array_equal(one.sum(lying(one, given_, liars[:1])), plain_sum(names_of(9)))
    if len(liars) == 2:  # an active box is told 8 shares of which 2 are wrong: 6 right ones are one too few
        with pytest.raises(TrustError, match="do not fit its signed keys: either"):
            one.sum(lying(one, given_, liars))


def test_liars_among_many_are_found_by_a_bounded_search() -> None:
    one = Round(names_of(36)).keys().shares().upload(away={"box-36"}).agree()
    liars = ["box-02", "box-19"]
    rebuilt = secure_sum.rebuild(one.circle, one.told, lying(one, one.unmask(), liars))
    assert rebuilt.wrong_shares
    assert {teller for _, teller in rebuilt.wrong_shares} <= set(liars)
    assert len(rebuilt.self_secrets) == 35
    assert rebuilt.mask_secrets == {"box-36": one.parts["box-36"].secrets.mask_secret}


def test_a_box_that_dealt_wrong_shares_stops_the_round_and_nothing_is_read() -> None:
    """Its commitment and its shares disagree: which of them is the lie, nobody can tell."""
    one = Round(names_of(5)).keys()
    cheat = one.parts["box-03"]
    one.parts["box-03"] = changed(cheat, secrets=changed(cheat.secrets, self_secret=b"other than signed"[:16]))
    one.shares().upload().agree()
    with pytest.raises(TrustError, match=re.escape("either that box (box-03) dealt wrong shares, or some of the 4")):
        one.sum(one.unmask())


def test_shares_signatures_and_unmaskings_that_were_not_asked_for_are_refused() -> None:
    one = Round(names_of(6)).keys().shares().upload(away={"box-06"}).agree()
    made = one.made["box-01"]
    for wrong, reason in (
        (changed(made, cohort_digest=bytes(32)), "another cohort"),
        (changed(made, sealed={}), "not for its neighbours"),
    ):
        with pytest.raises(TrustError, match=reason):
            secure_sum.check_shares(one.circle, "box-01", wrong)
    with pytest.raises(TrustError, match="another cohort"):
        secure_sum.check_shares(one.circle, "box-99", made)
    with pytest.raises(TrustError, match="did not sign"):
        secure_sum.check_signature(one.circle, one.told, "box-01", one.signed["box-02"])
    with pytest.raises(TrustError, match="did not sign"):
        secure_sum.check_signature(one.circle, one.told, "box-06", one.signed["box-05"])
    right = one.unmask()["box-01"]
    both = changed(right, mask_shares=right.mask_shares | {"box-02": bytes(16)})
    for given_ in (both, changed(right, self_shares={}), changed(right, mask_shares={})):
        with pytest.raises(TrustError, match="other shares"):
            secure_sum.check_unmask(one.circle, one.told, "box-01", given_)
    with pytest.raises(TrustError, match="other shares"):
        secure_sum.check_unmask(one.circle, one.told, "box-06", right)


# --- a hub that lies ------------------------------------------------------------------------------


def test_a_hub_that_tells_two_lists_gets_enough_signatures_for_neither() -> None:
    """Half the boxes are told that box-08 dropped out, the others that it did not: nobody gives a share."""
    names = names_of(8)
    one = Round(names).keys().shares().upload()
    whole = one.told
    without = changed(whole, active=tuple(names[:7]), dropped=("box-08",))
    agreed: dict[str, list[Survivors]] = {}
    for number, name in enumerate(names[:7]):
        one.told = whole if number % 2 else without
        one.parts[name], one.signed[name] = box.sign_survivors(one.parts[name], identity(name), one.told, message_id=ID)
        agreed.setdefault("whole" if number % 2 else "without", []).append(one.told)
    assert {side: len(told) for side, told in agreed.items()} == {"without": 4, "whole": 3}
    for name in names[:7]:
        with pytest.raises(TrustError, match="neighbours signed the same survivors, 5 are needed"):
            one.unmask(away=set(names) - {name})


@pytest.fixture(scope="module")
def circle_of_33() -> Round:
    return Round(names_of(33)).keys().shares().upload()


@pytest.mark.parametrize(
    ("colluders", "opens"),
    [
        (12, {9: (True, False), 10: (True, False), 11: (False, True)}),
        (13, {9: (True, False), 10: (True, True), 11: (False, True)}),
    ],
)
def test_more_than_a_third_of_its_neighbours_bare_a_box(
    circle_of_33: Round, colluders: int, opens: dict[int, tuple[bool, bool]]
) -> None:
    """Of 32 neighbours 13 in league with the hub open both secrets of box-33, and 12 do not.

    `opens`: by the number of honest boxes told that it dropped out, whether its self secret and its mask secret open. More
    told so help the second alone, fewer the first alone: between these there is nothing to gain.

    Those in league with the hub sign both lists and give it both shares; nobody else does anything but what it should.
    """
    one, names = circle_of_33, names_of(33)
    neighbours, needed = len(names) - 1, cohort.threshold(32)
    assert (needed, 2 * needed - neighbours + 1) == (22, 13)
    own = one.parts[names[-1]].secrets
    for told, expected in opens.items():
        gathered = both_secrets(one, names[:colluders], names[colluders : colluders + told])
        assert (gathered[0] == own.self_secret, gathered[1] == own.mask_secret) == expected


def both_secrets(one: Round, league: list[str], told_dropped: list[str]) -> tuple[bytes | None, bytes | None]:
    """What the hub gathers that tells these, and its league, that the last box dropped out, and all others the truth."""
    target, whole = one.told.active[-1], one.told
    without = changed(whole, active=whole.active[:-1], dropped=(target,))
    truth = [name for name in whole.active if name not in {*league, *told_dropped}]
    given_self = {
        name: given_.self_shares[target] for name, given_ in unmasked(one, whole, truth, league) if name != target
    }
    given_mask = {name: given_.mask_shares[target] for name, given_ in unmasked(one, without, told_dropped, league)}
    for name in league:
        given_self[name] = one.parts[name].held[target].of_self_secret
        given_mask[name] = one.parts[name].held[target].of_mask_secret
    numbers = {name: number for number, name in enumerate(one.circle.graph[target], 1)}

    def combined(given_: dict[str, bytes]) -> bytes | None:
        enough = len(given_) >= one.circle.threshold(target)
        return shares.combine({numbers[name]: share for name, share in given_.items()}) if enough else None

    return combined(given_self), combined(given_mask)


def unmasked(one: Round, told: Survivors, honest: list[str], league: list[str]) -> list[tuple[str, Unmask]]:
    """What those honest boxes give that sign this list, with the signatures of the league beside theirs."""
    parts, signed = {}, {}
    for name in honest:
        parts[name], signed[name] = box.sign_survivors(one.parts[name], identity(name), told, message_id=ID)
    for name in league:
        signature = cohort.sign_survivors(identity(name), told)
        signed[name] = SurvivorsSigned(message_id=ID, round_id=told.round_id, signature=signature)
    given_ = []
    for name, part in parts.items():
        agreement = secure_sum.agreement_for(one.circle, signed, name, message_id=ID)
        with contextlib.suppress(TrustError):  # too few signed the same
            given_.append((name, box.unmask(part, agreement, message_id=ID)))
    return given_


def test_who_waits_for_the_sum_is_told_before_each_box() -> None:
    one, told = Round(names_of(6)).keys().shares().upload(away={"box-06"}).agree(), []
    rebuilt = secure_sum.rebuild(one.circle, one.told, one.unmask(), alive=lambda: told.append("rebuild"))
    total = MaskedSum(23, 32)
    for name in one.told.active:
        total.add(one.uploads[name])
    sum_ = secure_sum.unmask(total, one.circle, one.told, rebuilt, alive=lambda: told.append("unmask"))
    assert told == ["rebuild"] * 6 + ["unmask"] * 2  # the one that dropped out, and one pass over the words
    np.testing.assert_array_equal(sum_, plain_sum(names_of(5)))


def test_what_was_rebuilt_is_not_in_a_log_line() -> None:
    one = Round(names_of(4)).keys().shares().upload().agree()
    rebuilt = secure_sum.rebuild(one.circle, one.told, one.unmask())
    assert repr(rebuilt) == "Rebuilt(4 active, 0 dropped)"


def test_the_hubs_values_come_back_from_their_bytes() -> None:
    one = Round(names_of(4)).keys().shares().upload().agree()
    rebuilt = secure_sum.rebuild(one.circle, one.told, one.unmask())
    for value in (one.circle, one.told, rebuilt):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value


# --- groups ---------------------------------------------------------------------------------------


def roster_of(count: int, salt: int = 0) -> Roster:
    names = names_of(count)
    digests = tuple(hashlib.sha256(f"{salt} {name}".encode()).digest() for name in names)
    return Roster(round_of(plan()), tuple(names), digests)


@given(st.integers(3, 60), st.integers(3, 12), st.integers(2, 6))
def test_dealt_groups_are_a_partition_and_none_is_smaller_or_larger_than_promised(
    boxes: int, groups: int, smallest: int
) -> None:
    count = secure_sum.group_count(boxes, groups, smallest)
    if not count:
        assert boxes < 3 * smallest
        return
    dealt = secure_sum.deal(roster_of(boxes), count)
    assert sorted(name for names in dealt for name in names) == names_of(boxes)
    assert 3 <= len(dealt) == count <= groups
    assert min(map(len, dealt)) >= smallest
    assert max(map(len, dealt)) <= secure_sum.largest_group(max(boxes, groups * smallest), groups, smallest)


def test_any_boxs_keys_deal_all_anew() -> None:
    """By chance alone: of 12 boxes in 4 groups a pair stays together in 2 of 11 deals."""
    everyone = roster_of(12)
    assert secure_sum.deal(everyone, 4) == secure_sum.deal(everyone, 4)
    together = 0
    for number in range(300):
        last = hashlib.sha256(bytes([number % 256, number // 256])).digest()
        dealt = secure_sum.deal(changed(everyone, keys_digests=(*everyone.keys_digests[:-1], last)), 4)
        together += any({"box-01", "box-02"} <= set(names) for names in dealt)
    assert 30 < together < 80


def test_each_group_has_its_own_cohort_graph_and_threshold() -> None:
    one = Round(names_of(11), plan(groups=3, min_cohort=3)).keys()
    circles = secure_sum.form_circles(round_of(one.plan), one.circle.keys, 3, 3)
    assert sorted(len(circle.roster.names) for circle in circles) == [3, 4, 4]
    assert len({circle.digest for circle in circles}) == 3
    for circle in circles:
        assert set(circle.graph) == set(circle.roster.names) == set(circle.keys)
        assert circle.min_cohort == 3
    with pytest.raises(LinkError, match="8 boxes sent keys, 9 are needed for 3 groups"):
        secure_sum.form_circles(round_of(one.plan), dict(list(one.circle.keys.items())[:8]), 3, 4)
