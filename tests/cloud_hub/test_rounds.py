"""The round's table: every state with every event, deadlines, late and repeated events."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.rounds import (
    COLLECTING,
    FINISHED,
    STAGES,
    Answered,
    CandidateReady,
    Command,
    Delivered,
    Event,
    Failed,
    Keyed,
    Masked,
    Member,
    Published,
    Refused,
    Round,
    Settled,
    Shared,
    Signed,
    State,
    Tick,
    Unmasked,
    advance,
    expects,
    is_stage_over,
)

DIGEST = "a" * 64
NEW = Round(State.INVITED, deadline_unix_s=100.0, min_devices=2, members=dict.fromkeys("abc", Member.INVITED))


def play(round_: Round, *events: Event, now: float = 1.0) -> Round:
    for event in events:
        round_, _ = advance(round_, event, now)
    return round_


def named(event: Event) -> str:
    """The same in every process: a set's order is not, and both workers must collect the same tests."""
    return f"Settled({event.of})" if isinstance(event, Settled) else str(event)


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


# --- masked rounds --------------------------------------------------------------------------------

BOXES = "abcde"
MASKED = Round(
    State.INVITED,
    deadline_unix_s=1000.0,
    min_devices=3,
    members=dict.fromkeys(BOXES, Member.INVITED),
    masked=Masked(stage_at=0.0, stage_s=60.0),
)
STAGE_EVENTS: list[type[Keyed | Shared | Delivered | Signed | Unmasked]] = [Keyed, Shared, Delivered, Signed, Unmasked]
MASKED_EVENTS: list[Event] = [
    *(event(device) for event in STAGE_EVENTS for device in "ab"),
    *(Settled(state, frozenset("abcd")) for state in STAGES),
    *EVENTS,
]


def all_give(round_: Round, event: type[Keyed | Shared | Delivered | Signed | Unmasked], who: str = BOXES) -> Round:
    return play(round_, *(event(device) for device in who))


def settled(round_: Round, staying: str = BOXES, now: float = 1.0) -> Round:
    return play(round_, Settled(round_.state, frozenset(staying)), now=now)


def at(state: State) -> Round:
    """Everybody on time until `state`; in it nobody yet, but for the one whose word it begins with."""
    round_ = MASKED
    for event in STAGE_EVENTS:
        if state is round_.state:
            return round_
        if (first := play(round_, event("b"))).state is state:
            return first
        round_ = settled(all_give(round_, event))
    assert round_.state is state
    return round_


def test_the_whole_way_of_a_masked_round() -> None:
    round_, seen = MASKED, []
    for event in STAGE_EVENTS:
        round_ = all_give(round_, event, "abcd")
        assert not is_stage_over(round_, 1.0)
        seen.append(round_.state)
        round_ = all_give(round_, event, "e")
        assert is_stage_over(round_, 1.0)
        round_ = settled(round_)
        seen.append(round_.state)
    assert seen == [
        State.KEYS, State.SHARING, State.SHARING, State.TRAINING, State.UPLOADING,
        State.AGREEING, State.AGREEING, State.UNMASKING, State.UNMASKING, State.SUMMED,
    ]  # fmt: skip
    assert round_.members == dict.fromkeys(BOXES, Member.UNMASKED)
    assert round_.masked is not None
    assert round_.masked.active == frozenset(BOXES)
    assert play(round_, CandidateReady(DIGEST), Published()).state is State.RELEASED


def test_stage_waits_for_its_time_and_training_for_the_deadline() -> None:
    begun = replace(MASKED, masked=Masked(stage_at=500.0, stage_s=60.0))
    for state in (State.KEYS, State.SHARING, State.AGREEING, State.UNMASKING):
        members = dict.fromkeys(BOXES, STAGES[state].waits_for[0])
        waiting = replace(begun, state=state, members=members)
        assert [is_stage_over(waiting, now) for now in (559.9, 560.0)] == [False, True], state
    for state in (State.INVITED, State.TRAINING, State.UPLOADING):
        members = dict.fromkeys(BOXES, STAGES[state].waits_for[0])
        waiting = replace(begun, state=state, members=members)
        assert [is_stage_over(waiting, now) for now in (999.9, 1000.0)] == [False, True], state


def test_stage_begins_when_its_state_is_entered() -> None:
    keyed = play(MASKED, Keyed("a"), now=7.0)
    assert keyed.masked is not None
    assert keyed.masked.stage_at == 7.0
    again = play(keyed, Keyed("b"), now=8.0)
    assert again.masked is not None
    assert again.masked.stage_at == 7.0
    shared = settled(all_give(again, Keyed), now=9.0)
    assert shared.masked is not None
    assert shared.masked.stage_at == 9.0


def test_open_round_has_no_stages() -> None:
    assert not is_stage_over(replace(NEW, state=State.TRAINING), 1e9)
    assert play(NEW, Keyed("a"), Settled(State.INVITED, frozenset("a"))) == NEW


def test_whoever_does_not_stay_has_left() -> None:
    sharing = settled(all_give(MASKED, Keyed, "abcd"), "abcd")
    assert sharing.members == {**dict.fromkeys("abcd", Member.KEYED), "e": Member.LEFT}
    training = settled(all_give(sharing, Shared, "abc"), "abc")
    assert training.members == {**dict.fromkeys("abc", Member.SHARED), "d": Member.LEFT, "e": Member.LEFT}


def test_settled_before_the_sum_is_told_the_active_ones_are_known_after_it() -> None:
    agreeing = settled(all_give(at(State.TRAINING), Delivered, "abcd"), "abcd")
    assert agreeing.masked is not None
    assert agreeing.masked.active == frozenset("abcd")
    unmasking = settled(all_give(agreeing, Signed, "abc"), "abcd")
    assert unmasking.members == {**dict.fromkeys("abc", Member.AGREED), "d": Member.DELIVERED, "e": Member.LEFT}


@pytest.mark.parametrize(("state", "event"), [(State.AGREEING, Signed), (State.UNMASKING, Unmasked)])
def test_whose_group_ended_after_the_sums_were_told_has_left(
    state: State, event: type[Signed] | type[Unmasked]
) -> None:
    after = settled(all_give(at(state), event, "abde"), "abc")
    gave = STAGES[state].arrived
    silent = STAGES[state].waits_for[0]
    assert after.members == {"a": gave, "b": gave, "c": silent, "d": Member.LEFT, "e": Member.LEFT}
    assert after.state is STAGES[state].then


@pytest.mark.parametrize(
    ("state", "after"),
    [
        (State.INVITED, Member.DECLINED),
        (State.SHARING, Member.DECLINED),
        (State.TRAINING, Member.LEFT),
        (State.AGREEING, Member.LEFT),
        (State.UNMASKING, Member.LEFT),
        (State.SUMMED, Member.UNMASKED),
    ],
)
def test_box_that_gives_up(state: State, after: Member) -> None:
    assert play(at(state), Answered("a", False)).members["a"] is after


def test_too_few_that_can_still_come_end_the_round_at_once() -> None:
    after = play(at(State.SHARING), Shared("a"), *(Answered(device, False) for device in "bcd"))
    assert (after.state, after.reason) == (
        State.DROPPED, "1 of 5 invited devices sent shares and 1 may still do so; 3 are needed",
    )  # fmt: skip


@pytest.mark.parametrize("state", [State.KEYS, State.SHARING, State.TRAINING, State.UPLOADING])
def test_revoked_before_the_sum_is_told_is_taken_out(state: State) -> None:
    before = replace(at(state), revoked=frozenset("a"))
    assert play(before, Tick()).members["a"] is Member.REFUSED
    assert play(before, Tick()).state is before.state


@pytest.mark.parametrize("state", [State.AGREEING, State.UNMASKING])
def test_revoked_after_the_sum_is_told_drops_the_round(state: State) -> None:
    after = play(replace(at(state), revoked=frozenset("a")), Tick())
    assert (after.state, after.reason[:13]) == (State.DROPPED, "a was revoked")


def test_revoked_and_not_in_the_sum_changes_nothing_once_it_is_told() -> None:
    agreeing = settled(all_give(at(State.TRAINING), Delivered, "abcd"), "abcd")
    assert play(replace(agreeing, revoked=frozenset("e")), Tick()).state is State.AGREEING


@pytest.mark.parametrize("state", STAGES)
def test_stage_takes_its_own_event_alone(state: State) -> None:
    before = replace(MASKED, state=state, members=dict.fromkeys(BOXES, STAGES[state].waits_for[-1]))
    for event in STAGE_EVENTS:
        moved = play(before, event("a")).members["a"] is not before.members["a"]
        assert moved == (event is STAGES[state].event) == expects(state, before.members["a"], event)


@pytest.mark.parametrize("event", MASKED_EVENTS, ids=named)
@pytest.mark.parametrize("state", State)
def test_every_state_of_a_masked_round_takes_every_event_twice(state: State, event: Event) -> None:
    before = at(state) if state in STAGES else replace(at(State.SUMMED), state=state)
    assert before.state is state
    once, commands = advance(before, event, 1.0)
    twice, again = advance(once, event, 1.0)
    assert (twice, again) == (once, commands)
    assert list(State).index(once.state) >= list(State).index(before.state)


@given(st.lists(st.sampled_from(MASKED_EVENTS), max_size=40))
def test_masked_round_never_goes_back_nor_changes_who_is_in_the_sum(events: list[Event]) -> None:
    round_ = MASKED
    for event in events:
        before = round_
        round_, _ = advance(round_, event, 1.0)
        assert list(State).index(round_.state) >= list(State).index(before.state)
        assert before.masked is not None
        assert round_.masked is not None
        if before.masked.active:
            assert round_.masked.active == before.masked.active
