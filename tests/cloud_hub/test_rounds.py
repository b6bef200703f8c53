"""The round's table: every state with every event, deadlines, late and repeated events."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.rounds import (
    COLLECTING,
    FINISHED,
    Answered,
    CandidateReady,
    Command,
    Delivered,
    Event,
    Failed,
    Member,
    Published,
    Refused,
    Round,
    State,
    Tick,
    advance,
)

DIGEST = "a" * 64
NEW = Round(State.INVITED, deadline_unix_s=100.0, min_devices=2, members=dict.fromkeys("abc", Member.INVITED))


def play(round_: Round, *events: Event, now: float = 1.0) -> Round:
    for event in events:
        round_, _ = advance(round_, event, now)
    return round_


def test_the_whole_way() -> None:
    steps: list[tuple[Event, State, tuple[Command, ...]]] = [
        (Tick(), State.INVITED, ()),
        (Answered("a", True), State.TRAINING, ()),
        (Answered("b", True), State.TRAINING, ()),
        (Delivered("a"), State.UPLOADING, ()),
        (Answered("c", False), State.UPLOADING, ()),
        (Delivered("b"), State.SUMMED, (Command.BUILD,)),
        (Tick(), State.SUMMED, (Command.BUILD,)),
        (CandidateReady(DIGEST), State.EVALUATED, (Command.PUBLISH,)),
        (Tick(), State.EVALUATED, (Command.PUBLISH,)),
        (Published(), State.RELEASED, (Command.CLOSE,)),
        (Tick(), State.RELEASED, (Command.CLOSE,)),
    ]
    round_ = NEW
    for event, state, commands in steps:
        round_, given_commands = advance(round_, event, 1.0)
        assert (round_.state, given_commands) == (state, commands), event
    assert round_.candidate_digest == DIGEST
    assert round_.members == {"a": Member.DELIVERED, "b": Member.DELIVERED, "c": Member.DECLINED}


def test_unanswered_device_is_waited_for_until_the_deadline() -> None:
    both_in = play(NEW, Answered("a", True), Answered("b", True), Delivered("a"), Delivered("b"))
    assert both_in.state is State.UPLOADING
    assert play(both_in, Tick(), now=99.9).state is State.UPLOADING
    assert play(both_in, Tick(), now=100.0).state is State.SUMMED


def test_deadline_without_enough_updates_drops_with_reason() -> None:
    one_in = play(NEW, Answered("a", True), Delivered("a"))
    after, commands = advance(one_in, Tick(), 100.0)
    assert after.state is State.DROPPED
    assert commands == (Command.CLOSE,)
    assert after.reason == "1 of 3 invited devices delivered at the deadline; 2 are needed"


def test_round_that_can_no_longer_reach_its_minimum_ends_at_once() -> None:
    after = play(NEW, Answered("a", False), Answered("b", False))
    assert after.state is State.DROPPED
    assert after.reason == "0 of 3 invited devices delivered and 1 may still deliver; 2 are needed"


def test_refused_update_leaves_the_others_counted() -> None:
    joined = play(NEW, *(Answered(device, True) for device in "abc"))
    after = play(joined, Refused("b"), Delivered("a"), Delivered("c"))
    assert after.state is State.SUMMED
    assert after.members["b"] is Member.REFUSED


REVOKED = replace(NEW, revoked=frozenset("a"))


def test_revoked_device_is_waited_for_no_longer_and_its_update_is_taken_out() -> None:
    assert play(REVOKED, Tick()).members == {**NEW.members, "a": Member.REFUSED}
    delivered = {"a": Member.DELIVERED, "b": Member.DELIVERED, "c": Member.JOINED}
    after = play(replace(REVOKED, state=State.UPLOADING, members=delivered), Delivered("c"))
    assert after.state is State.SUMMED
    assert after.members == {"a": Member.REFUSED, "b": Member.DELIVERED, "c": Member.DELIVERED}


def test_update_of_a_revoked_device_does_not_complete_the_sum() -> None:
    members = {"a": Member.JOINED, "b": Member.DELIVERED, "c": Member.DECLINED}
    after = play(replace(REVOKED, state=State.UPLOADING, members=members), Delivered("a"))
    assert (after.state, after.members["a"]) == (State.DROPPED, Member.REFUSED)


def test_what_a_revoked_device_said_itself_stays_and_a_closed_sum_is_left_alone() -> None:
    members = {**NEW.members, "a": Member.DECLINED}
    assert play(replace(REVOKED, members=members), Tick()).members["a"] is Member.DECLINED
    closed = replace(REVOKED, state=State.SUMMED, members={**NEW.members, "a": Member.DELIVERED})
    assert play(closed, Tick()) == closed


def test_state_never_goes_back_when_the_only_joined_device_is_refused() -> None:
    assert play(NEW, Answered("a", True), Refused("a")).state is State.TRAINING


@pytest.mark.parametrize("state", [state for state in State if state not in FINISHED])
def test_failure_drops_with_its_reason(state: State) -> None:
    after, commands = advance(replace(NEW, state=state), Failed("parity 0.3 exceeds 0.0001"), 1.0)
    assert (after.state, after.reason, commands) == (State.DROPPED, "parity 0.3 exceeds 0.0001", (Command.CLOSE,))


EVENTS: list[Event] = [
    Answered("a", True),
    Answered("a", False),
    Delivered("a"),
    Refused("a"),
    Answered("stranger", True),
    Delivered("stranger"),
    Tick(),
    CandidateReady(DIGEST),
    Failed("why"),
    Published(),
]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, EVENTS)), ids=str)
def test_every_state_takes_every_event_twice(state: State, event: Event) -> None:
    before = replace(NEW, state=state)
    once, commands = advance(before, event, 1.0)
    twice, again = advance(once, event, 1.0)
    assert (twice, again) == (once, commands)
    assert list(State).index(twice.state) >= list(State).index(state)


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("state", FINISHED)
def test_finished_round_is_left_as_it_is(state: State, event: Event) -> None:
    before = replace(NEW, state=state)
    assert advance(before, event, 1e9)[0] == before


@pytest.mark.parametrize("state", [State.SUMMED, State.EVALUATED])
def test_closed_sum_takes_no_late_update(state: State) -> None:
    before = replace(NEW, state=state, members={**NEW.members, "a": Member.JOINED})
    assert play(before, Delivered("a"), Refused("a"), Answered("b", True)) == before


def test_device_may_still_decline_when_its_training_failed_but_not_come_back() -> None:
    assert play(NEW, Answered("a", True), Answered("a", False)).members["a"] is Member.DECLINED
    assert play(NEW, Answered("a", False), Answered("a", True)).members["a"] is Member.DECLINED


def test_delivered_update_stays_counted_whatever_the_device_says_later() -> None:
    assert play(NEW, Answered("a", True), Delivered("a"), Answered("a", False)).members["a"] is Member.DELIVERED


def test_update_of_a_device_that_did_not_join_is_not_taken() -> None:
    assert play(NEW, Delivered("a")).members["a"] is Member.INVITED


@given(st.lists(st.sampled_from([*EVENTS, Answered("b", True), Delivered("b"), Answered("c", True)]), max_size=30))
def test_summed_only_with_enough_delivered(events: list[Event]) -> None:
    round_ = NEW
    for event in events:
        before = round_
        round_, _ = advance(round_, event, 1.0)
        if before.state in COLLECTING and round_.state is State.SUMMED:
            assert list(round_.members.values()).count(Member.DELIVERED) >= NEW.min_devices
