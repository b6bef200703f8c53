"""The box's tables of states: each transition, each command, and that anything else changes nothing."""

from typing import get_args

import pytest

from edge_agent.rounds import (
    BEFORE_SEALING,
    BEFORE_UPDATE,
    COUNTED,
    GIVE_UP_AFTER_S,
    TABLES,
    WITH_UPDATE,
    Command,
    Event,
    Kind,
    State,
    advance,
    expired,
)

S, E, C = State, Event, Command
KINDS = get_args(Kind)
END = (C.DROP_TRANSFER, C.DROP_UPDATE)
OUT = (C.SAY_NO, C.DROP_PART, *END)
OPEN_STATES = (S.INVITED, S.TRAINING, S.UPLOADING, S.DELIVERED, S.DECLINED)
MASKED_STATES = tuple(s for s in S if s not in (S.CLOSED, *BEFORE_SEALING))
STATES = {
    "unsafe_open": OPEN_STATES,
    "masked": MASKED_STATES,
    "buffered_open": (*OPEN_STATES, *BEFORE_SEALING),
    "buffered_masked": (*MASKED_STATES, *BEFORE_SEALING),
}
MASKED_KINDS: tuple[Kind, ...] = ("masked", "buffered_masked")
LIVING = [(kind, state) for kind in KINDS for state in STATES[kind]]


def through(kind: Kind, *events: Event) -> list[tuple[State, tuple[Command, ...]]]:
    state, said = S.INVITED, []
    for event in events:
        state, commands = advance(kind, state, event)
        said.append((state, commands))
    return said


def test_an_open_round_that_goes_well() -> None:
    assert through("unsafe_open", E.ADMITTED, E.SEALED, E.ACCEPTED, E.CLOSED_BY_HUB) == [
        (S.TRAINING, (C.SAY_YES,)),
        (S.UPLOADING, (C.OFFER_UPDATE, C.DROP_SPOOL)),
        (S.DELIVERED, (C.DROP_TRANSFER,)),
        (S.CLOSED, (C.DROP_TRANSFER, C.DROP_UPDATE)),
    ]


def test_a_masked_round_that_goes_well() -> None:
    """What a step made is kept in the transaction in which it is said."""
    events = (E.ADMITTED, E.COHORT_ENTERED, E.SHARES_OPENED, E.SEALED, E.ACCEPTED, E.SURVIVORS_SIGNED, E.UNMASK_GIVEN)
    assert through("masked", *events, E.CLOSED_BY_HUB) == [
        (S.KEYED, (C.SAY_YES, C.KEEP_PART, C.PLEDGE_PRIVACY, C.SAY_STAGE)),
        (S.SHARED, (C.KEEP_PART, C.SAY_STAGE)),
        (S.TRAINING, (C.KEEP_PART,)),
        (S.UPLOADING, (C.KEEP_PART, C.SPEND_PRIVACY, C.NOTE_OPENED, C.OFFER_UPDATE, C.DROP_SPOOL)),
        (S.DELIVERED, (C.DROP_TRANSFER,)),
        (S.AGREED, (C.KEEP_PART, C.SAY_STAGE)),
        (S.UNMASKED, (C.SAY_STAGE,)),
        (S.CLOSED, (C.DROP_PART, *END)),
    ]


def test_a_buffered_masked_round_trains_before_it_says_its_keys() -> None:
    events = (E.ADMITTED, E.PREPARED, E.COHORT_ENTERED, E.SHARES_OPENED, E.SEALED)
    assert through("buffered_masked", *events) == [
        (S.PREPARING, (C.SAY_YES, C.PLEDGE_PRIVACY)),
        (S.KEYED, (C.KEEP_SPOOL, C.KEEP_PART, C.SAY_STAGE)),
        (S.SHARED, (C.KEEP_PART, C.SAY_STAGE)),
        (S.TRAINING, (C.KEEP_PART,)),
        (S.UPLOADING, (C.KEEP_PART, C.SPEND_PRIVACY, C.NOTE_OPENED, C.OFFER_UPDATE, C.DROP_SPOOL)),
    ]


def test_a_buffered_open_round_keeps_its_update_until_the_receipt() -> None:
    assert through("buffered_open", E.ADMITTED, E.PREPARED, E.SEALED, E.ACCEPTED, E.CLOSED_BY_HUB) == [
        (S.PREPARING, (C.SAY_YES, C.PLEDGE_PRIVACY)),
        (S.TRAINING, (C.KEEP_SPOOL,)),
        (S.UPLOADING, (C.OFFER_UPDATE, C.SHOW_SPOOL)),
        (S.DELIVERED, (C.DROP_TRANSFER, C.DROP_USED)),
        (S.CLOSED, END),
    ]


@pytest.mark.parametrize("kind", ["buffered_open", "buffered_masked"])
@pytest.mark.parametrize(
    ("state", "event", "after", "commands"),
    [
        (S.INVITED, E.REFUSED_HERE, S.DECLINED, (C.SAY_NO,)),
        (S.PREPARING, E.INVITATION, S.PREPARING, (C.SAY_YES,)),
        (S.PREPARING, E.FAILED, S.DECLINED, (C.SAY_NO, C.DROP_PART)),
        (S.PREPARING, E.CLOSED_BY_HUB, S.LATE, (C.DROP_PART,)),
        (S.PREPARING, E.LEFT_OUT, S.LATE, (C.DROP_PART,)),
        (S.PREPARING, E.DEADLINE, S.LATE, (C.SAY_NO, C.DROP_PART)),
        (S.LATE, E.PREPARED, S.CLOSED, (C.KEEP_SPOOL,)),
        (S.LATE, E.INVITATION, S.LATE, (C.SAY_NO,)),
        (S.LATE, E.CLOSED_BY_HUB, S.LATE, ()),
        (S.LATE, E.FAILED, S.CLOSED, ()),
        (S.LATE, E.GIVEN_UP, S.CLOSED, ()),
    ],
)
def test_who_is_late_goes_on_training_for_a_later_round(
    kind: Kind, state: State, event: Event, after: State, commands: tuple[Command, ...]
) -> None:
    assert advance(kind, state, event) == (after, commands)


@pytest.mark.parametrize(
    ("state", "event", "after", "commands"),
    [
        (S.TRAINING, E.LOST, S.PREPARING, ()),
        (S.UPLOADING, E.REJECTED, S.CLOSED, END),
        (S.UPLOADING, E.LEFT_OUT, S.CLOSED, END),
        (S.UPLOADING, E.CLOSED_BY_HUB, S.CLOSED, (C.DROP_USED, *END)),
        (S.UPLOADING, E.GIVEN_UP, S.CLOSED, (C.DROP_USED, *END)),
        (S.TRAINING, E.CLOSED_BY_HUB, S.CLOSED, (C.DROP_USED,)),
        (S.TRAINING, E.DEADLINE, S.CLOSED, (C.SAY_NO, C.DROP_USED)),
        (S.TRAINING, E.LEFT_OUT, S.CLOSED, ()),
    ],
)
def test_an_open_update_goes_back_to_the_spool_only_where_it_was_surely_not_counted(
    state: State, event: Event, after: State, commands: tuple[Command, ...]
) -> None:
    assert advance("buffered_open", state, event) == (after, commands)


def test_no_masked_update_stays_in_the_spool_once_it_is_sealed() -> None:
    for kind in MASKED_KINDS:
        for (_, event), (after, commands) in TABLES[kind].items():
            assert (C.DROP_SPOOL in commands) == (event is E.SEALED), (kind, event, after)


@pytest.mark.parametrize("kind", KINDS)
def test_being_left_out_ends_whatever_being_closed_ends(kind: Kind) -> None:
    for state in State:
        assert advance(kind, state, E.LEFT_OUT)[0] is advance(kind, state, E.CLOSED_BY_HUB)[0]


@pytest.mark.parametrize(
    ("state", "event", "after", "commands"),
    [
        (S.INVITED, E.REFUSED_HERE, S.DECLINED, (C.SAY_NO,)),
        (S.TRAINING, E.FAILED, S.DECLINED, (C.SAY_NO,)),
        (S.TRAINING, E.DEADLINE, S.CLOSED, (C.SAY_NO,)),
        (S.TRAINING, E.CLOSED_BY_HUB, S.CLOSED, ()),
        (S.UPLOADING, E.REJECTED, S.CLOSED, END),
        (S.UPLOADING, E.LOST, S.TRAINING, (C.DROP_TRANSFER,)),
        (S.UPLOADING, E.GIVEN_UP, S.CLOSED, END),
        (S.DECLINED, E.INVITATION, S.DECLINED, (C.SAY_NO,)),
        (S.DELIVERED, E.INVITATION, S.UPLOADING, (C.SAY_YES, C.OFFER_UPDATE)),
        (S.DELIVERED, E.LOST, S.DECLINED, (C.SAY_NO,)),
    ],
)
def test_refusals_and_repairs(state: State, event: Event, after: State, commands: tuple[Command, ...]) -> None:
    assert advance("unsafe_open", state, event) == (after, commands)


@pytest.mark.parametrize(
    ("state", "event", "after", "commands"),
    [
        (S.INVITED, E.REFUSED_HERE, S.DECLINED, (C.SAY_NO,)),
        (S.DECLINED, E.INVITATION, S.DECLINED, (C.SAY_NO,)),
        (S.UPLOADING, E.REJECTED, S.CLOSED, (C.DROP_PART, *END)),
        (S.UPLOADING, E.SURVIVORS_SIGNED, S.AGREED, (C.KEEP_PART, C.SAY_STAGE, C.DROP_TRANSFER)),
        *((state, E.FAILED, S.DECLINED, OUT) for state in (*BEFORE_UPDATE, *WITH_UPDATE)),
        *((state, E.LOST, S.DECLINED, OUT) for state in WITH_UPDATE),
        *((state, E.CLOSED_BY_HUB, S.CLOSED, (C.DROP_PART, *END)) for state in (*BEFORE_UPDATE, *WITH_UPDATE)),
        *((state, E.DEADLINE, S.CLOSED, (C.SAY_NO, C.DROP_PART)) for state in BEFORE_UPDATE),
        *((state, E.GIVEN_UP, S.CLOSED, (C.DROP_PART, *END)) for state in WITH_UPDATE),
        *((state, E.INVITATION, state, (C.SAY_YES, C.SAY_STAGE)) for state in (*BEFORE_UPDATE, S.UPLOADING)),
        *((state, E.INVITATION, S.UPLOADING, (C.SAY_YES, C.SAY_STAGE, C.OFFER_UPDATE)) for state in COUNTED),
        *((state, E.COHORT_ENTERED, state, (C.SAY_STAGE,)) for state in (S.SHARED, S.TRAINING, *WITH_UPDATE)),
        *((state, E.SURVIVORS_SIGNED, state, (C.SAY_STAGE,)) for state in (S.AGREED, S.UNMASKED)),
        (S.UNMASKED, E.UNMASK_GIVEN, S.UNMASKED, (C.SAY_STAGE,)),
    ],
)
def test_refusals_and_repairs_of_a_masked_round(
    state: State, event: Event, after: State, commands: tuple[Command, ...]
) -> None:
    assert advance("masked", state, event) == (after, commands)


@pytest.mark.parametrize("kind", MASKED_KINDS)
def test_no_second_update_is_made_in_a_masked_round(kind: Kind) -> None:
    """Once there was one, training is out of reach, whatever happens."""
    reached, frontier = set(), {S.UPLOADING}
    while frontier:
        reached |= frontier
        frontier = {advance(kind, state, event)[0] for state in frontier for event in E} - reached
    assert reached == {*WITH_UPDATE, S.DECLINED, S.CLOSED}


@pytest.mark.parametrize("kind", MASKED_KINDS)
def test_a_masked_round_given_up_is_never_taken_up_again(kind: Kind) -> None:
    for event in E:
        assert advance(kind, S.DECLINED, event)[0] in (S.DECLINED, S.CLOSED)


@pytest.mark.parametrize("kind", MASKED_KINDS)
def test_whatever_ends_a_masked_round_drops_its_secrets(kind: Kind) -> None:
    for state in (*BEFORE_UPDATE, *WITH_UPDATE):
        for event in E:
            after, commands = advance(kind, state, event)
            assert (after in (S.DECLINED, S.CLOSED)) == (C.DROP_PART in commands), (state, event)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_an_event_out_of_place_changes_nothing(kind: Kind, state: State, event: Event) -> None:
    if (state, event) not in TABLES[kind]:
        assert advance(kind, state, event) == (state, ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event", list(Event))
def test_closed_is_the_end(kind: Kind, event: Event) -> None:
    """A hub that forgot it is told so."""
    assert advance(kind, S.CLOSED, event) == (S.CLOSED, (C.SAY_NO,) if event is E.INVITATION else ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "event", [E.ADMITTED, E.REFUSED_HERE, E.PREPARED, E.SHARES_OPENED, E.SEALED, E.FAILED, E.ACCEPTED, E.REJECTED]
)
def test_the_same_event_twice_is_the_event_once(kind: Kind, event: Event) -> None:
    for state in State:
        once, _ = advance(kind, state, event)
        assert advance(kind, once, event) == (once, ())


@pytest.mark.parametrize("event", [E.COHORT_ENTERED, E.SURVIVORS_SIGNED, E.UNMASK_GIVEN])
def test_a_stage_asked_for_twice_is_only_said_twice(event: Event) -> None:
    for state in State:
        once, commands = advance("masked", state, event)
        again = (C.SAY_STAGE,) if commands else ()
        assert advance("masked", once, event) == (once, again)


@pytest.mark.parametrize(("kind", "state"), LIVING)
def test_every_open_round_can_be_closed_by_the_hub(kind: Kind, state: State) -> None:
    assert advance(kind, state, E.CLOSED_BY_HUB)[0] is (S.LATE if state in BEFORE_SEALING else S.CLOSED)


def test_the_clock() -> None:
    deadline = 1000.0
    assert expired(S.TRAINING, deadline, 999.9) is None
    assert expired(S.TRAINING, deadline, 1000.0) is E.DEADLINE
    assert expired(S.SHARED, deadline, 1000.0) is E.DEADLINE
    assert expired(S.UPLOADING, deadline, 1000.0) is None
    assert expired(S.AGREED, deadline, 1000.0) is None
    assert expired(S.UPLOADING, deadline, 1000.0 + GIVE_UP_AFTER_S) is E.GIVEN_UP
    assert expired(S.PREPARING, deadline, 1000.0) is E.DEADLINE
    assert expired(S.LATE, deadline, 1000.0) is None
    assert expired(S.LATE, deadline, 1000.0 + GIVE_UP_AFTER_S) is E.GIVEN_UP
    assert expired(S.CLOSED, deadline, 1e12) is None


@pytest.mark.parametrize(("kind", "state"), LIVING)
def test_no_open_round_lives_for_ever(kind: Kind, state: State) -> None:
    for _ in range(2):  # preparing, late
        event = expired(state, 0.0, GIVE_UP_AFTER_S)
        if event is not None:
            state, _ = advance(kind, state, event)
    assert state is S.CLOSED
