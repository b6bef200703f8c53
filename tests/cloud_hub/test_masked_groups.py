"""A masked round summed in groups: to the last bit, who drops out where, poisoned words, kill -9, and what is refused."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_hub import database, link, registry, views
from cloud_hub.database import Database, MaskedGroup, Round
from edge_agent import config
from edge_agent.policy import Facts, may_join
from fleet_link.errors import SiteError
from fleet_link.messages import RoundAnswer, RoundKeys, RoundPlan, Shares, SurvivorsSigned, Unmask
from models import addable, round_layout
from models.bundle import SHIPPED, read_bundle
from models.delta import Arrays
from tests.cloud_hub.masked_house import UPDATE, House, opened
from tests.cloud_hub.masked_twin import EXAMPLES, IDS, MaskedTwin, layout_of, plain_mean
from tests.cloud_hub.round_support import RoundHub, change_of, failing_export, make_round_hub, needs_bundle

pytestmark = [needs_bundle, pytest.mark.slow]
NAMES = tuple(f"box-{number:02}" for number in range(1, 13))
WITHOUT: dict[type[Any], tuple[float, str]] = {  # how long it is waited for, and how three boxes' group says so
    Shares: (61.0, "2 of 3 boxes sent shares; with enough neighbours 0, needed 3; missing: {}"),
    UPDATE: (3601.0, "2 of 3 boxes uploaded, 3 are needed; missing: {}"),
    SurvivorsSigned: (61.0, "1 shares short for {}; missing: {}"),
    Unmask: (61.0, "1 shares short for {}; missing: {}"),
}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with opened(tmp_path, *NAMES) as made:
        yield made


def start(house: House, groups: int = 4, **changes: object) -> RoundPlan:
    return house.start(groups=groups, rule="median", **changes)


def groups(house: House) -> dict[int, list[str]]:
    return {row["group"]: row["devices"] for row in shown(house)}


def shown(house: House) -> list[dict[str, Any]]:
    with house.hub.files.database.reading() as session:
        found: list[dict[str, Any]] = views.round_(session, house.hub.round_id)["cohorts"]
    return found


def reasons(house: House) -> dict[int, str]:
    return {row["group"]: row["reason"] for row in shown(house) if row["reason"]}


def told_dropped(house: House) -> set[str]:
    """Whose boxes hear at the end that nothing of them is in what was released."""
    with house.hub.files.database.reading() as session:
        row = session.get_one(Round, house.hub.round_id)
        return {
            name
            for name in NAMES
            if link._closed(row.round_id, row, link._why_in_no_sum(session, row.round_id, name)).outcome == "dropped"
        }


def median_of(plan: RoundPlan, house: House, *cohorts: list[str]) -> Arrays:
    """What the hub must find, from updates that were never masked."""
    means = [plain_mean(plan, [house.twins[name] for name in names]) for names in cohorts]
    stacked = {name: np.stack([mean[name] for mean in means]).astype(np.float64) for name in means[0]}
    return {name: np.median(values, axis=0).astype(np.float32) for name, values in stacked.items()}


def check_release(house: House, plan: RoundPlan, *cohorts: list[str]) -> None:
    house.check_released_mean(median_of(plan, house, *cohorts))


# --- the whole way --------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
def test_what_is_released_is_the_median_of_the_groups_means_to_the_last_bit(house: House, restarts: bool) -> None:
    house.restarts = restarts
    plan = start(house)
    house.play("summed")
    assert house.facts() == ("summed", ["unmasked"] * 12)
    dealt = groups(house)
    assert sorted(name for names in dealt.values() for name in names) == list(NAMES)
    assert [len(names) for names in dealt.values()] == [3, 3, 3, 3]
    check_release(house, plan, *dealt.values())


def test_each_groups_sum_is_that_of_its_plain_updates_and_weighs_its_boxes(house: House) -> None:
    plan = start(house, groups=3, devices=list(NAMES[:11]))
    house.twins.pop(NAMES[11])
    house.play("summed")
    dealt = groups(house)
    assert sorted(len(names) for names in dealt.values()) == [3, 4, 4]
    for number, names in dealt.items():
        found, boxes = house.hub.intake._mean_of_group(plan, number)
        expected = plain_mean(plan, [house.twins[name] for name in names])
        assert boxes == len(names)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_box_hears_of_its_own_group_alone(house: House) -> None:
    start(house)
    house.play("sharing")
    for names in groups(house).values():
        for name in names:
            cohort: Any = house.owed(name)
            assert (list(cohort.names), set(cohort.neighbours)) == (names, set(names) - {name})
    house.play("agreeing")
    for names in groups(house).values():
        told: Any = house.owed(names[0])
        assert list(told.active) == names


def test_the_groups_are_kept_when_the_round_is_over_and_what_was_said_in_them_is_not(house: House) -> None:
    start(house)
    house.play("summed")
    before = groups(house)
    house.hub.tick_until("released")
    house.hub.coordinator.tick(house.hub.now)
    with house.hub.files.database.reading() as session:
        rows = session.query(MaskedGroup).filter_by(round_id=house.hub.round_id).all()
        assert [(row.circle, row.sharing, row.survivors) for row in rows] == [(None, None, None)] * 4
    assert groups(house) == before


# --- who drops out --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("restarts", [False, True])
def test_a_group_that_loses_too_many_ends_alone(house: House, kind: type[Any], restarts: bool) -> None:
    plan = start(house)
    house.play("sharing")
    number, (away, *others) = list(groups(house).items())[1]
    house.withhold(kind, away)
    house.play("summed")
    house.wait(WITHOUT[kind][0])
    if restarts:
        house.hub.restart()
    reason = WITHOUT[kind][1].format(*([away] if kind in (Shares, UPDATE) else [", ".join(others), away]))
    assert reasons(house) == {number: reason}
    for name in (away, *others):
        member = house.hub.member(name)
        assert (member.state, member.reason) == ("left", f"group {number} was left out: {reason}")
    house.play("summed")
    check_release(house, plan, *(names for each, names in groups(house).items() if each != number))
    assert told_dropped(house) == {away, *others}


def test_a_group_of_five_goes_on_without_one(tmp_path: Path) -> None:
    house = House(make_round_hub(tmp_path, *(f"box-{number:02}" for number in range(15))))
    plan = start(house, groups=3)
    house.play("training")
    dealt = groups(house)
    house.withhold(UPDATE, dealt[1][0])
    house.play("summed")
    house.wait(3601.0)
    house.play("summed")
    assert reasons(house) == {}
    check_release(house, plan, dealt[1][1:], dealt[2], dealt[3])


def test_fewer_keys_than_the_groups_need_make_fewer_groups(house: House) -> None:
    plan = start(house)
    late = NAMES[4]
    house.withhold(RoundKeys, late)
    house.withhold(RoundAnswer, late)
    house.play("sharing")
    house.wait(61.0)
    house.play("summed")
    dealt = groups(house)
    assert sorted(len(names) for names in dealt.values()) == [3, 4, 4]
    assert late not in [name for names in dealt.values() for name in names]
    assert plan.boxes_max == 4
    check_release(house, plan, *dealt.values())


def test_too_few_keys_for_three_groups_drop_the_round(house: House) -> None:
    start(house)
    for kind in (RoundKeys, RoundAnswer):
        house.withhold(kind, *NAMES[:4])
    house.play("sharing")
    house.wait(61.0)
    assert house.hub.round().reason == "8 boxes sent keys, 9 are needed for 3 groups"


@pytest.mark.parametrize("kind", WITHOUT)
def test_fewer_groups_than_the_rule_needs_drop_the_round_and_say_which_ended(house: House, kind: type[Any]) -> None:
    start(house)
    house.play("sharing")
    (first, one), (second, other) = list(groups(house).items())[:2]
    house.withhold(kind, one[0], other[0])
    house.play("summed")
    house.wait(WITHOUT[kind][0])
    row = house.hub.round()
    assert row.state == "dropped"
    assert row.reason.startswith(f"2 of 4 groups are left, median needs 3; group {first}: ")
    assert f"; group {second}: " in row.reason
    assert house.hub.release(2) is None


def test_fewer_boxes_than_asked_for_in_all_groups_drop_the_round(house: House) -> None:
    start(house, min_devices=10)
    house.play("sharing")
    house.withhold(SurvivorsSigned, groups(house)[2][1])
    house.play("summed")
    house.wait(61.0)
    assert house.hub.round().reason == "9 boxes are left in their groups, 10 are needed"


@pytest.mark.parametrize("state", ["agreeing", "unmasking"])
def test_a_box_revoked_after_the_sums_were_told_ends_its_group_alone(house: House, state: str) -> None:
    plan = start(house)
    house.play(state)
    number, (gone, *_) = list(groups(house).items())[2]
    with house.hub.files.database.writing() as session:
        registry.revoke(session, gone, now=house.hub.now)
    house.hub.coordinator.tick(house.hub.now)
    assert house.hub.round().state == state
    twin = house.twins.pop(gone)
    house.play("summed")
    house.wait(61.0)
    assert reasons(house) == {number: f"{gone} was revoked after its masked update went into the sum"}
    house.twins[gone] = twin
    house.play("summed")
    check_release(house, plan, *(names for each, names in groups(house).items() if each != number))


# --- poisoned words -------------------------------------------------------------------------------


class Poisoner(MaskedTwin):
    """Masks whatever words it likes: nobody can look at them."""

    kind: str = "within the bound"

    def encoded(self, plan: RoundPlan) -> NDArray[np.unsignedinteger]:
        """Within the bound: turns the mean of its sum round, and makes it as long as honest boxes' may be."""
        layout, honest = layout_of(plan), super().encoded(plan)
        if self.kind == "any words":
            return np.random.default_rng(3).integers(0, 1 << plan.word_bits, layout.word_count, layout.word_type)
        if self.kind == "all weight":
            honest[0] = layout.boxes * 255
            return honest
        change = {name: np.full(shape, -1.0, np.float32) for name, shape in layout.shapes.items()}
        share = round_layout.weight_share(EXAMPLES, plan)
        words, _ = addable.encode(change, layout, share, np.random.default_rng(7))
        words[1:] *= layout.word_type.type(math.floor(0.9 * layout.boxes))
        return words


def poisoned(house: House, kind: str, name: str = NAMES[0]) -> None:
    twin = house.twins[name] = Poisoner(house.hub.boxes[name].identity, house.hub.trust)
    twin.kind = kind


def mean_change(house: House) -> float:
    row = house.hub.tick_until("released")
    change = change_of(house.hub, str(row.candidate_digest))
    moved = np.concatenate([values.ravel() for values in change.values() if values.any()])
    return float(moved.mean())


def test_a_poisoner_turns_the_one_sum_and_not_the_median_of_groups(house: House) -> None:
    """Honest boxes move every weight by 0.01 to 0.12; the poisoner turns what its words are added to."""
    plan = house.start()
    poisoned(house, "within the bound")
    house.play("summed")
    assert mean_change(house) < -0.05
    house.hub.coordinator.tick(house.hub.now)

    plan = start(house, now=house.hub.now)
    poisoned(house, "within the bound")
    house.play("summed")
    spoiled = next(number for number, names in groups(house).items() if NAMES[0] in names)
    honest = [names for number, names in groups(house).items() if number != spoiled]
    assert max(value.max() for value in house.hub.intake._mean_of_group(plan, spoiled)[0].values()) < 0.0
    row = house.hub.tick_until("released")
    change = change_of(house.hub, str(row.candidate_digest))
    means = [plain_mean(plan, [house.twins[name] for name in names]) for names in honest]
    for name in means[0]:
        stacked = np.stack([mean[name] for mean in means])
        base = read_bundle(SHIPPED).weights[name]
        rounding = 4 * np.spacing(np.abs(base) + 1.0)
        assert (change[name] >= stacked.min(0) - rounding).all()
        assert (change[name] <= stacked.max(0) + rounding).all()
    assert reasons(house) == {}


@pytest.mark.parametrize(
    ("kind", "why"),
    [("any words", "the masked sum is refused: a "), ("all weight", "the masked sum is refused: a sum of weight ")],
)
@pytest.mark.parametrize("restarts", [False, True])
def test_a_group_whose_sum_honest_boxes_cannot_have_is_left_out(
    house: House, kind: str, why: str, restarts: bool
) -> None:
    plan = start(house)
    poisoned(house, kind)
    house.play("summed")
    spoiled = next(number for number, names in groups(house).items() if NAMES[0] in names)
    if restarts:  # the reason is stored, and the export dies with the hub: the others are summed once more
        house.hub.export_command = failing_export("import time; time.sleep(600)")
        house.hub.restart()
        house.hub.coordinator.tick(house.hub.now)
        house.hub.coordinator.stop()
        house.hub.export_command = RoundHub.export_command
        house.hub.restart()
    check_release(house, plan, *(names for number, names in groups(house).items() if number != spoiled))
    assert list(reasons(house)) == [spoiled]
    assert reasons(house)[spoiled].startswith(why)


def test_poisoners_in_two_of_four_groups_drop_the_round_with_each_groups_reason(house: House) -> None:
    start(house)
    house.play("sharing")
    one, other = groups(house)[1][0], groups(house)[4][0]
    for name in (one, other):
        twin = house.twins[name]
        poisoned(house, "any words", name)
        house.twins[name].__dict__.update({key: vars(twin)[key] for key in ("plan", "_kept", "state")})
    house.play("summed")
    reason = house.hub.tick_until("dropped").reason
    assert reason.startswith(
        "median cannot be computed: 2 of 4 groups are left, median needs 3; group 1: the masked sum"
    )
    assert "; group 4: the masked sum is refused: " in reason


def test_shares_that_no_subset_repairs_end_their_group_alone(house: House) -> None:
    plan = start(house)
    house.play("unmasking")
    number, names = next(iter(groups(house).items()))
    (given,) = house.twins[names[0]].hear(house.owed(names[0]), house.hub.now)  # type: ignore[arg-type]
    assert isinstance(given, Unmask)
    lie = Unmask(
        message_id=IDS[Unmask],
        round_id=given.round_id,
        self_shares=dict.fromkeys(given.self_shares, bytes(16)),
        mask_shares={},
    )
    assert house.give(names[0], lie) == (True, "")
    house.play("summed")
    check_release(house, plan, *(each for other, each in groups(house).items() if other != number))
    assert reasons(house)[number].startswith("the masks do not come off: the shares of one box's secret do not fit")


def test_an_update_lost_from_disk_costs_its_group_alone(house: House) -> None:
    plan = start(house)
    house.play("summed")
    number, names = list(groups(house).items())[3]
    kept = house.hub.files.config.paths.rounds / house.hub.round_id / "updates" / f"{names[0]}.sealed"
    kept.write_bytes(b"rotten")
    house.hub.restart()  # the sum in memory is gone
    check_release(house, plan, *(each for other, each in groups(house).items() if other != number))
    assert reasons(house)[number].startswith(f"the counted update of {names[0]} cannot be read again")
    assert told_dropped(house) == set(names)


def test_what_was_made_for_another_group_is_refused(house: House) -> None:
    start(house)
    house.play("sharing")
    (one, *_), (other, *_) = groups(house)[1], groups(house)[2]
    (made,) = house.twins[other].hear(house.owed(other), house.hub.now)  # type: ignore[arg-type]
    assert isinstance(made, Shares)
    assert house.give(one, made) == (False, f"shares of {one} are for another cohort")
    with house.hub.files.database.reading() as session:
        assert views.refusals(session, limit=5)[0]["device"] == one


# --- kill -9 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["keys", "sharing", "training", "uploading", "agreeing", "unmasking", "summed"])
def test_hub_killed_in_a_state_goes_on_in_it_with_the_same_groups(house: House, state: str) -> None:
    plan = start(house)
    house.play(state)
    before, dealt = house.facts(), groups(house)
    house.hub.restart()
    assert (house.facts(), groups(house)) == (before, dealt)
    house.play("summed")
    if dealt:
        assert groups(house) == dealt
    check_release(house, plan, *groups(house).values())


@pytest.mark.parametrize("state", ["keys", "sharing", "uploading", "unmasking", "summed"])
def test_a_round_of_the_former_schema_goes_on(house: House, state: str) -> None:
    plan = house.start(devices=list(NAMES[:5]))
    for name in NAMES[5:]:
        house.twins.pop(name)
    house.play(state)
    house.hub.files.database.close()
    _make_former(house.hub.files.database)
    house.hub.files.database.close()
    house.hub.files.database = database.connect(house.hub.files.config.paths.database)
    house.hub.restart()
    house.play("summed")
    house.check_release(plan, NAMES[:5])


def _make_former(db: Database) -> None:
    """Schema 2 had one group's columns in masked_rounds."""
    with db.writing() as session:
        connection = session.connection()
        for column in ("circle", "sharing", "survivors"):
            connection.exec_driver_sql(f"ALTER TABLE masked_rounds ADD COLUMN {column} BLOB")
            connection.exec_driver_sql(
                f"UPDATE masked_rounds SET {column} = (SELECT {column} FROM masked_groups WHERE masked_groups.round_id = masked_rounds.round_id)"
            )
        connection.exec_driver_sql("DROP TABLE masked_groups")
        connection.exec_driver_sql("PRAGMA user_version=2")


# --- orders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"groups": 4}, "the average of 4 groups withstands no more than that of all boxes"),
        ({"groups": 2, "rule": "median"}, "median over 2 groups cannot tell which is off, 3 are needed"),
        ({"groups": 5, "rule": "krum"}, "12 devices are invited, 5 groups of 3 need 15"),
        ({"groups": 3, "rule": "median", "devices": list(NAMES[:8])}, "8 devices are invited, 3 groups of 3 need 9"),
        ({"groups": 3, "rule": "median", "min_devices": 13}, "12 devices are invited, 13 are needed"),
        ({"groups": 3, "rule": "median", "kind": "unsafe_open"}, "only a masked round is summed in groups"),
        ({"rule": "median"}, "a masked round shows the sum alone"),
    ],
)
def test_what_cannot_go_together_is_refused_and_no_round_starts(
    house: House, wish: dict[str, object], reason: str
) -> None:
    with pytest.raises(SiteError, match=reason) as refused:
        house.hub.start(**{"kind": "masked", **wish})
    assert refused.value.advice
    with house.hub.files.database.reading() as session:
        assert session.query(Round).all() == []


def test_the_plans_numbers_are_those_of_one_groups_sum(house: House) -> None:
    plan = start(house, groups=3, noise=1.0)
    assert (plan.groups, plan.rule, plan.min_cohort, plan.boxes_max, plan.noise_boxes) == (3, "median", 3, 4, 3)
    assert (house.hub.round().min_devices, plan.word_bits) == (9, 32)


def test_a_site_that_asks_for_more_boxes_than_a_group_has_declines(house: House) -> None:
    plan = start(house, groups=3)
    facts = Facts(base_here=True, train_examples=50, local_minute=0)
    shipped = config.parse({}, folder=Path("/srv/box")).policy
    policies = {size: replace(shipped, min_cohort=size, weights_may_leave=("heads",)) for size in (3, 4, 5)}
    answers = {size: may_join(plan, policy, facts, house.hub.now) for size, policy in policies.items()}
    assert answers == {
        3: "",
        4: "",
        5: "at most 4 boxes stand in the round's sum, this site asks for 5 (policy.min_cohort)",
    }


def test_the_sites_own_cohort_holds_for_its_group(house: House) -> None:
    """A box that asks for 4 and is dealt into a group of 3 shares nothing."""
    start(house, groups=3, devices=list(NAMES[:11]))
    house.twins.pop(NAMES[11])
    house.play("sharing")
    three = next(names for names in groups(house).values() if len(names) == 3)
    part = house.twins[three[0]]._part
    house.twins[three[0]]._keep(type(part)(**{**_fields(part), "min_cohort": 4}))
    with pytest.raises(Exception, match="a cohort of 3, this box asks for 4"):
        house.twins[three[0]].hear(house.owed(three[0]), house.hub.now)  # type: ignore[arg-type]


def _fields(part: Any) -> dict[str, Any]:
    return {name: getattr(part, name) for name in part.__struct_fields__}
