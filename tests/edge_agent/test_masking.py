"""The box's side of a masked round: each step, each step twice, and everything that an honest box must refuse."""

import numpy as np
import pytest
import rich.pretty

from cloud_hub import secure_sum
from edge_agent import masking as box
from fleet_link import cohort
from fleet_link.errors import SiteError, TrustError
from fleet_link.messages import Agreement, SharesForwarded
from fleet_link.pki import Identity
from tests.fleet_link.mosquitto_support import TestAuthority
from tests.masked_support import ID, JUDGE, Round, changed, flipped, identity, integers, names_of, plan

NAMES = names_of(6)  # 4 of 5 neighbours are needed


def begun() -> Round:
    return Round(NAMES).keys()


def forwarded(one: Round, name: str = "box-01") -> SharesForwarded:
    return secure_sum.forwarded_for(one.circle, one.sharing, one.made, name, message_id=ID)


# --- keys and cohort ------------------------------------------------------------------------------


def test_the_site_may_ask_for_more_than_the_plan_and_never_for_less() -> None:
    for own, planned, allowed in ((0, 0, 2), (5, 3, 5), (3, 5, 5)):
        part, _ = box.begin(
            plan(min_cohort=planned), identity("box-01"), box.draw_secrets(), min_cohort=own, message_id=ID
        )
        assert part.min_cohort == allowed


def test_a_cohort_below_the_sites_own_minimum_is_refused() -> None:
    with pytest.raises(TrustError, match="a cohort of 6, this box asks for 7"):
        Round(NAMES, min_cohort=7).keys().shares()


def test_the_same_cohort_again_gives_the_same_packets_and_another_is_refused() -> None:
    one = begun()
    smaller = Round(NAMES, parts=dict(one.parts))
    smaller.circle = secure_sum.form_circle(
        one.circle.roster.of, {name: one.circle.keys[name] for name in NAMES[:5]}, 2
    )
    shown = secure_sum.cohort_for(one.circle, "box-01", message_id=ID)
    part, first = box.enter(one.parts["box-01"], shown, JUDGE, message_id=ID)
    again, second = box.enter(part, shown, JUDGE, message_id=ID)
    assert first == second
    assert again == part
    with pytest.raises(TrustError, match="a second, other cohort in round round-1"):
        box.enter(part, secure_sum.cohort_for(smaller.circle, "box-01", message_id=ID), JUDGE, message_id=ID)


def test_a_device_of_another_authority_among_the_neighbours_is_refused() -> None:
    class Rogue(Round):
        def keys(self, away: object = ()) -> "Rogue":
            super().keys()
            stranger: Identity = TestAuthority("other CA").issue("box-06")
            _, message = box.begin(self.plan, stranger, box.draw_secrets(), min_cohort=2, message_id=ID)
            self.circle = secure_sum.form_circle(
                self.circle.roster.of, self.circle.keys | {"box-06": message.keys}, min_cohort=2
            )
            return self

    with pytest.raises(TrustError, match="certificate of box-06 not accepted"):
        Rogue(NAMES).keys().shares()


def test_a_hub_that_shows_two_boxes_different_cohorts_gets_no_update() -> None:
    """The packets are bound to the cohort their maker saw: those of the other half do not open."""
    one = begun()
    smaller = secure_sum.form_circle(one.circle.roster.of, {name: one.circle.keys[name] for name in NAMES[:5]}, 2)
    for number, name in enumerate(NAMES[:5]):
        circle = smaller if number % 2 else one.circle
        shown = secure_sum.cohort_for(circle, name, message_id=ID)
        one.parts[name], one.made[name] = box.enter(one.parts[name], shown, JUDGE, message_id=ID)
    one.sharing = tuple(NAMES[:5])
    with pytest.raises(TrustError, match="shares of box-02 do not open here"):
        box.admit(one.parts["box-01"], forwarded(one))
    for name in ("box-02", "box-04"):
        with pytest.raises(TrustError, match="another cohort"):
            box.admit(one.parts[name], forwarded(one, name))


# --- shares ---------------------------------------------------------------------------------------


def test_packets_tampered_with_swapped_or_replayed_are_refused() -> None:
    one, other = begun().shares(), begun().shares()
    sound = forwarded(one)
    part = one.parts["box-01"]
    second, third = sound.sealed["box-02"], sound.sealed["box-03"]
    for sealed in (
        {"box-02": flipped(second)},
        {"box-02": third, "box-03": second},
        {"box-02": one.made["box-02"].sealed["box-03"]},  # made for another neighbour
        {"box-02": one.made["box-01"].sealed["box-02"]},  # its own, sent back
        {"box-02": other.made["box-02"].sealed["box-01"]},  # of another round
    ):
        with pytest.raises(TrustError, match="do not open here"):
            box.admit(part, changed(sound, sealed=sound.sealed | sealed))
    with pytest.raises(TrustError, match="another cohort"):
        box.admit(part, forwarded(other))
    box.admit(part, sound)


def test_senders_who_are_no_neighbours_too_few_or_other_ones_are_refused() -> None:
    one = begun().shares()
    sound, part = forwarded(one), one.parts["box-01"]
    with pytest.raises(TrustError, match="no neighbour: box-99"):
        box.admit(part, changed(sound, sealed=sound.sealed | {"box-99": bytes(60)}))
    with pytest.raises(TrustError, match="no neighbour: box-01"):
        box.admit(part, changed(sound, sealed=sound.sealed | {"box-01": bytes(60)}))
    few = changed(sound, sealed={name: sound.sealed[name] for name in NAMES[1:4]})
    with pytest.raises(TrustError, match="3 of 5 neighbours sent their shares, 4 are needed"):
        box.admit(part, few)
    admitted = box.admit(part, sound)
    assert box.admit(admitted, sound) == admitted
    four = changed(sound, sealed={name: sound.sealed[name] for name in NAMES[1:5]})
    with pytest.raises(TrustError, match="a second, other choice"):
        box.admit(admitted, four)
    with pytest.raises(TrustError, match="no cohort yet"):
        box.admit(begun().parts["box-01"], sound)


def test_too_few_left_for_the_sites_minimum_is_refused_before_training() -> None:
    one = Round(NAMES, min_cohort=6).keys().shares(away={"box-06"})
    with pytest.raises(TrustError, match="at most 5 boxes are left, this box asks for 6"):
        box.admit(one.parts["box-01"], forwarded(one))


# --- the masked update ----------------------------------------------------------------------------


def test_an_update_is_masked_once_in_a_round() -> None:
    """Two updates under the same masks would give away their difference."""
    one = begun().shares()
    part = box.admit(one.parts["box-01"], forwarded(one))
    with pytest.raises(TrustError, match="nobody to mask against"):
        box.mask(one.parts["box-01"], integers("box-01"))
    part, masked = box.mask(part, integers("box-01"))
    assert box.mask(part, integers("box-01")) == (part, masked)
    with pytest.raises(TrustError, match="another update was masked before"):
        box.mask(part, integers("box-02"))
    with pytest.raises(ValueError, match="no vector of 32-bit"):
        box.mask(part, integers("box-01", word_bits=16))


@pytest.mark.parametrize("word_bits", [16, 32])
def test_a_masked_update_looks_like_chance_and_is_no_larger_than_float32(word_bits: int) -> None:
    count = 200_000
    update = np.full(count, 3, f"int{word_bits}")
    update[::2] = np.arange(count // 2) % 100
    one = Round(NAMES, plan(word_bits=word_bits)).keys().shares()
    _, masked = box.mask(box.admit(one.parts["box-01"], forwarded(one)), update)
    assert len(masked) == count * word_bits // 8 <= 4 * count
    histogram = np.bincount(np.frombuffer(masked, np.uint8), minlength=256)
    expected = len(masked) / 256
    assert ((histogram - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)  # chi square, six sigma
    words = np.frombuffer(masked, f"<i{word_bits // 8}").astype(np.float64)
    assert abs(np.corrcoef(words, update)[0, 1]) < 6 / np.sqrt(count)
    assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 6 / np.sqrt(count)
    assert (words == update).sum() < 10 + count * 6 / 2**word_bits
    for begin in range(0, 4000, 40):
        assert update[begin : begin + 4].tobytes() not in masked
    assert (update == np.where(np.arange(count) % 2, 3, np.arange(count) // 2 % 100)).all()  # the caller's is untouched


# --- survivors ------------------------------------------------------------------------------------


@pytest.fixture
def uploaded() -> Round:
    return Round(names_of(9)).keys().shares(away={"box-09"}).upload(away={"box-08"})  # 6 of 8 neighbours are needed


@pytest.mark.parametrize(
    ("active", "dropped", "reason"),
    [
        ("1234567", "78", "active and as dropped: box-07"),
        ("123456", "78", None),
        ("234567", "18", "not in the sum"),
        ("234567", "8", "not in the sum"),
        ("1", "2345678", "a sum of 1 boxes, this box asks for 2"),
        ("1234567", "", "not as this box was told before: box-08"),
        ("1234567", "89", "not as this box was told before: box-09"),
        ("12345679", "8", "not as this box was told before: box-09"),
        ("7654321", "8", "not in order"),
        ("1234567x", "8", "not in the cohort: box-0x"),
    ],
)
def test_survivors_that_cannot_be_true_are_not_signed(
    uploaded: Round, active: str, dropped: str, reason: str | None
) -> None:
    told = changed(
        uploaded.told,
        active=tuple(f"box-0{number}" for number in active),
        dropped=tuple(f"box-0{number}" for number in dropped),
    )
    part = uploaded.parts["box-01"]
    if reason is None:
        assert box.sign_survivors(part, identity("box-01"), told, message_id=ID)[0].stage == "signed"
    else:
        with pytest.raises(TrustError, match=reason):
            box.sign_survivors(part, identity("box-01"), told, message_id=ID)


def test_survivors_are_signed_once_and_only_by_who_gave_an_update(uploaded: Round) -> None:
    me = identity("box-01")
    part, first = box.sign_survivors(uploaded.parts["box-01"], me, uploaded.told, message_id=ID)
    again, second = box.sign_survivors(part, me, changed(uploaded.told, message_id="1" * 32), message_id=ID)
    assert (again, second) == (part, first)
    other = changed(uploaded.told, active=uploaded.told.active[:6], dropped=("box-07", "box-08"))
    with pytest.raises(TrustError, match="a second, other list of survivors"):
        box.sign_survivors(part, me, other, message_id=ID)
    liar = changed(uploaded.told, active=(*uploaded.told.active, "box-08"), dropped=())
    silent = uploaded.parts["box-08"]  # shared, never masked
    with pytest.raises(TrustError, match="has given no update"):
        box.sign_survivors(silent, identity("box-08"), liar, message_id=ID)


def test_a_sum_below_the_sites_own_minimum_is_not_signed() -> None:
    with pytest.raises(TrustError, match="a sum of 5 boxes, this box asks for 6"):
        Round(NAMES, min_cohort=6).keys().shares().upload(away={"box-06"}).agree()


# --- unmasking ------------------------------------------------------------------------------------


def test_of_each_neighbour_one_share_and_never_both() -> None:
    one = Round(names_of(7)).keys().shares().upload(away={"box-07"}).agree()
    for name, given in one.unmask().items():
        assert set(given.self_shares) == set(one.told.active) - {name}
        assert set(given.mask_shares) == {"box-07"}
        assert given.self_shares == {other: one.parts[name].held[other].of_self_secret for other in given.self_shares}
        assert given.mask_shares["box-07"] == one.parts[name].held["box-07"].of_mask_secret


def test_nothing_is_unmasked_without_enough_signatures_of_active_neighbours() -> None:
    one = Round(NAMES).keys().shares().upload().agree()
    part = one.parts["box-01"]
    sound = secure_sum.agreement_for(one.circle, one.signed, "box-01", message_id=ID)
    four = dict(list(sound.signatures.items())[:4])
    assert box.unmask(part, changed(sound, signatures=four), message_id=ID)
    for signatures in (
        dict(list(four.items())[:3]),
        four | {"box-02": flipped(four["box-02"])},
        four | {"box-02": four["box-03"]},  # the same one twice
        {},
    ):
        with pytest.raises(TrustError, match="of 5 neighbours signed the same survivors, 4 are needed"):
            box.unmask(part, changed(sound, signatures=signatures), message_id=ID)
    own = changed(sound, signatures=four | {"box-01": one.signed["box-01"].signature})
    with pytest.raises(TrustError, match="no neighbour: box-01"):
        box.unmask(part, own, message_id=ID)
    with pytest.raises(TrustError, match="has not signed"):
        box.unmask(part, changed(sound, round_id="round-2"), message_id=ID)


def test_a_dropped_neighbours_signature_does_not_count() -> None:
    one = Round(NAMES).keys().shares().upload()
    told = changed(one.told, active=tuple(NAMES[:4]), dropped=tuple(NAMES[4:]))
    part, _ = box.sign_survivors(one.parts["box-01"], identity("box-01"), told, message_id=ID)
    signatures = {name: cohort.sign_survivors(identity(name), told) for name in NAMES[1:]}
    with pytest.raises(TrustError, match="3 of 5 neighbours signed"):
        box.unmask(part, Agreement(message_id=ID, round_id="round-1", signatures=signatures), message_id=ID)


def test_no_agreement_before_the_survivors() -> None:
    one = Round(NAMES).keys().shares().upload()
    agreement = Agreement(message_id=ID, round_id="round-1", signatures={})
    with pytest.raises(TrustError, match="has not signed"):
        box.unmask(one.parts["box-01"], agreement, message_id=ID)


# --- what is kept ---------------------------------------------------------------------------------


def test_a_part_comes_back_from_its_bytes_at_every_stage_and_shows_no_secret() -> None:
    one = Round(NAMES).keys()
    stages = [one.parts["box-01"]]
    for step in (one.shares, one.upload, one.agree):
        step()
        stages.append(one.parts["box-01"])
    assert [part.stage for part in stages] == ["begun", "entered", "masked", "signed"]
    secrets = stages[0].secrets
    shown = ""
    for part in stages:
        assert box.decode(box.encode(part)) == part
        shown += (
            f"{part!r} {part} {part.secrets!r} {rich.pretty.pretty_repr(part)} {rich.pretty.pretty_repr(part.secrets)}"
        )
    for secret in (secrets.mask_secret, secrets.self_secret, secrets.share_key):
        assert repr(secret)[2:12] not in shown
    assert "Part('round-1', 'box-01', 'signed')" in shown


def test_a_damaged_file_is_the_sites_matter() -> None:
    kept = box.encode(Round(NAMES).keys().parts["box-01"])
    for damaged in (b"", kept[:-1], kept + b"\x00", b"\xff" * 20):
        with pytest.raises(SiteError, match="damaged"):
            box.decode(damaged)


def test_secrets_are_new_each_time() -> None:
    first, second = box.draw_secrets(), box.draw_secrets()
    assert len({first.mask_secret, first.self_secret, second.mask_secret, second.self_secret}) == 4
    assert first.share_key != second.share_key
