"""Buffered rounds on the hub: the table of states, what a plan says, who is late, and a hub that starts again."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from cloud_hub import fleet_tables, ledger, releases, views
from cloud_hub.database import Device, Release
from cloud_hub.rollout import Stage
from cloud_hub.rounds import (
    Answered,
    Buffer,
    Delivered,
    DeviceEvent,
    Event,
    Keyed,
    Masked,
    Member,
    Refused,
    Round,
    Settled,
    State,
    Tick,
    advance,
    is_stage_over,
    stage_ends_at,
)
from fleet_link.errors import SiteError
from models.bundle import SHIPPED, BundleParts, read_bundle, write_bundle
from tests.cloud_hub.round_support import RoundHub, change_of, make_round_hub, needs_bundle

BOXES = "abcde"
OPEN = Round(State.INVITED, 1000.0, 2, dict.fromkeys(BOXES, Member.INVITED), buffer=Buffer(3, 500.0))
MASKED = replace(OPEN, min_devices=3, masked=Masked(stage_at=0.0, stage_s=60.0), buffer=Buffer(4, 500.0))


def play(round_: Round, *events: Event, now: float = 1.0) -> Round:
    for event in events:
        round_, _ = advance(round_, event, now)
    return round_


# --- the table ------------------------------------------------------------------------------------


def test_an_open_sum_is_closed_as_soon_as_the_buffer_is_full() -> None:
    joined = play(OPEN, *(Answered(device, True) for device in "abcd"))
    two = play(joined, Delivered("a"), Delivered("c"))
    assert two.state is State.UPLOADING
    full = play(two, Delivered("d"))
    assert full.state is State.SUMMED
    assert full.members == {
        **dict.fromkeys("acd", Member.DELIVERED),
        "b": Member.LEFT,
        "e": Member.LEFT,
    }
    assert play(full, Delivered("b")) == full


def test_at_the_deadline_an_open_sum_takes_fewer_than_the_buffer_has_room_for() -> None:
    two = play(OPEN, *(Answered(device, True) for device in BOXES), Delivered("a"), Delivered("c"))
    after = play(two, Tick(), now=1000.0)
    assert after.state is State.SUMMED
    assert [device for device, member in after.members.items() if member is Member.LEFT] == ["b", "d", "e"]
    assert play(play(OPEN, Answered("a", True), Delivered("a")), Tick(), now=1000.0).state is State.DROPPED


def test_the_cohort_is_the_first_whose_keys_came() -> None:
    three = play(MASKED, Answered("b", True), Keyed("a"), Keyed("c"), Keyed("e"))
    assert three.state is State.KEYS
    assert not is_stage_over(three, 499.0)
    full = play(three, Keyed("d"))
    assert is_stage_over(full, 1.0)
    sharing = play(full, Settled(full.state, frozenset("acde")))
    assert sharing.state is State.SHARING
    assert sharing.members == {**dict.fromkeys("acde", Member.KEYED), "b": Member.LEFT}
    assert play(sharing, Keyed("b")).members["b"] is Member.LEFT


def test_keys_are_waited_for_until_the_later_stages_need_the_time() -> None:
    """Not stage_s after the first ones, as in a round that trains after them."""
    one = play(MASKED, Keyed("a"), now=7.0)
    assert [is_stage_over(one, now) for now in (67.0, 499.9, 500.0)] == [False, False, True]
    after_restart = replace(one, masked=Masked(stage_at=600.0, stage_s=60.0))
    assert stage_ends_at(after_restart) == 660.0
    shared = replace(one, state=State.TRAINING, members=dict.fromkeys(BOXES, Member.SHARED))
    assert stage_ends_at(shared) == 1000.0


def test_a_round_that_is_not_buffered_waits_for_all_keys() -> None:
    plain = replace(MASKED, buffer=None)
    keyed = play(plain, *(Keyed(device) for device in "abcd"))
    assert not is_stage_over(keyed, 2.0)
    assert is_stage_over(play(keyed, Keyed("e")), 2.0)


def test_a_revoked_box_fills_no_buffer() -> None:
    keyed = play(MASKED, *(Keyed(device) for device in "abc"))
    revoked = play(replace(keyed, revoked=frozenset("a")), Keyed("d"))
    assert not is_stage_over(revoked, 1.0)
    assert is_stage_over(play(revoked, Keyed("e")), 1.0)


WORDS: list[DeviceEvent] = [
    event
    for device in BOXES
    for event in (Answered(device, True), Answered(device, False), Keyed(device), Delivered(device), Refused(device))
]


@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_no_open_sum_has_more_updates_than_the_buffer(events: list[DeviceEvent]) -> None:
    round_ = OPEN
    for event in events:
        before, round_ = round_, play(round_, event)
        members = list(round_.members.values())
        assert members.count(Member.DELIVERED) <= 3
        if round_.state is State.SUMMED and before.state is not State.SUMMED:
            assert members.count(Member.DELIVERED) >= OPEN.min_devices
            assert not {Member.INVITED, Member.JOINED} & set(members)


@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_no_masked_cohort_has_more_boxes_than_the_buffer(events: list[DeviceEvent]) -> None:
    """As ledger.advance does: settled in the step in which it is over."""
    round_ = MASKED
    for event in events:
        round_ = play(round_, event)
        if round_.state in (State.INVITED, State.KEYS) and is_stage_over(round_, 1.0):
            arrived = frozenset(device for device, member in round_.members.items() if member is Member.KEYED)
            assert len(arrived) <= 4
            round_ = play(round_, Settled(round_.state, arrived))
    if round_.state is State.SHARING:
        assert list(round_.members.values()).count(Member.KEYED) <= 4


# --- the plan -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RoundHub]:
    made = make_round_hub(tmp_path, *BOXES)
    yield made
    made.coordinator.stop()
    made.files.database.close()


def publish(hub: RoundHub, version: str, state: Stage = Stage.EVERYONE) -> str:
    base = read_bundle(SHIPPED)
    weights = {name: value + step(version) for name, value in base.weights.items()}
    parts = BundleParts(base.manifest, base.onnx, weights, base.known_inputs, base.known_outputs, f"release {version}")
    write_bundle(hub.folder / "next.bundle", parts)
    released = hub.repository.publish(hub.folder / "next.bundle", round_id="", now=hub.now)
    with hub.files.database.writing() as session:
        releases.add_row(session, released, now=hub.now)
        session.get_one(Release, released.release_version).state = state
    return released.bundle_digest


def step(version: str) -> float:
    return 1e-6 * int(version)


@needs_bundle
def test_a_plan_lists_the_releases_that_led_to_its_base_newest_first(hub: RoundHub) -> None:
    (first,) = (release.bundle_digest for release in hub.repository.listed())
    second, _, fourth = publish(hub, "2"), publish(hub, "3", Stage.HALTED), publish(hub, "4")
    publish(hub, "5", Stage.CANARY)
    plan = hub.start(buffer=3)
    assert (plan.base_digest, plan.buffer, plan.bases) == (fourth, 3, (fourth, second, first))
    with hub.files.database.writing() as session:
        ledger.drop(session, hub.round_id, "", hub.now)
    assert hub.start(buffer=3, stale_max=1).bases == (fourth, second)


@needs_bundle
def test_the_words_of_a_masked_buffer_are_for_as_many_boxes_as_it_holds(hub: RoundHub) -> None:
    plan = hub.start(kind="masked", buffer=3)
    assert (plan.boxes_max, plan.buffer, plan.min_cohort) == (3, 3, 3)
    assert plan.value_bits > 8


@needs_bundle
@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"buffer": 6}, "5 devices are invited, 6 are needed"),
        ({"buffer": 2, "kind": "masked"}, "a buffer of 2 updates, and the round needs 3"),
        ({"buffer": 1}, "a buffer of 1 updates, and the round needs 2"),
        ({"buffer": 3, "rule": "median"}, "median compares updates"),
        ({"buffer": 3, "share": 0.5, "trainable": "all", "kind": "masked"}, "drawn anew in each round"),
        ({"stale_max": 2}, "only a buffered round takes updates over older releases"),
    ],
)
def test_a_buffer_that_cannot_end_well_is_refused(hub: RoundHub, wish: dict[str, object], reason: str) -> None:
    with pytest.raises(SiteError, match=reason):
        hub.start(**wish)


# --- from the order to the release ----------------------------------------------------------------


@needs_bundle
@pytest.mark.parametrize("restart", [False, True])
def test_an_open_buffer_is_released_without_the_box_that_is_late(hub: RoundHub, restart: bool) -> None:
    plan = hub.start(buffer=3)
    hub.join(*BOXES)
    for value, name in enumerate("abc", 1):
        assert hub.deliver(name, hub.boxes[name].seal(plan, 0.01 * value)) == ""
        if restart:
            hub.restart()
    assert hub.round().state == "summed"
    late = hub.deliver("d", hub.boxes["d"].seal(plan, 1.0))
    assert late == ledger.LATE
    assert (hub.member("d").state, hub.member("d").reason, hub.member("d").counted_at) == ("left", ledger.LATE, None)
    hub.tick_until("released")
    released = hub.release(2)
    assert released is not None
    moved = {round(float(value.mean()), 3) for value in change_of(hub, released.bundle_digest).values() if value.any()}
    assert moved == {0.02}


# --- what is shown --------------------------------------------------------------------------------


def text_of(table: Table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


@needs_bundle
def test_buffer_and_staleness_are_shown(hub: RoundHub) -> None:
    hub.start(buffer=3, stale_max=2)
    publish(hub, "2")
    status = {"round_id": hub.round_id, "state": "uploading", "staleness": 2}
    with hub.files.database.writing() as session:
        session.get_one(Device, "a").heartbeat = json.dumps({"rounds": [status]})
    with hub.files.database.reading() as session:
        row = views.round_(session, hub.round_id)
    assert "buffer 3 updates, 0 releases old at most" in text_of(fleet_tables.round_(row))
    shown = text_of(fleet_tables.members(row["members"]))
    assert "uploading, 2 releases old" in shown
    assert shown.count("old") == 1
