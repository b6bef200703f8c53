"""The box's table of states: each transition, each command, and that anything else changes nothing."""

import pytest

from edge_agent.rounds import GIVE_UP_AFTER_S, TABLE, Command, Event, State, advance, expired

S, E, C = State, Event, Command


def test_a_round_that_goes_well() -> None:
    state, said = S.INVITED, []
    for event in (E.ADMITTED, E.SEALED, E.ACCEPTED, E.CLOSED_BY_HUB):
        state, commands = advance(state, event)
        said.append((state, commands))
    assert said == [
        (S.TRAINING, (C.SAY_YES,)),
        (S.UPLOADING, (C.OFFER_UPDATE,)),
        (S.DELIVERED, (C.DROP_TRANSFER,)),
        (S.CLOSED, (C.DROP_TRANSFER, C.DROP_UPDATE)),
    ]


@pytest.mark.parametrize(
    ("state", "event", "after", "commands"),
    [
        (S.INVITED, E.REFUSED_HERE, S.DECLINED, (C.SAY_NO,)),
        (S.TRAINING, E.FAILED, S.DECLINED, (C.SAY_NO,)),
        (S.TRAINING, E.DEADLINE, S.CLOSED, (C.SAY_NO,)),
        (S.TRAINING, E.CLOSED_BY_HUB, S.CLOSED, ()),
        (S.UPLOADING, E.REJECTED, S.CLOSED, (C.DROP_TRANSFER, C.DROP_UPDATE)),
        (S.UPLOADING, E.LOST, S.TRAINING, (C.DROP_TRANSFER,)),
        (S.UPLOADING, E.GIVEN_UP, S.CLOSED, (C.DROP_TRANSFER, C.DROP_UPDATE)),
        (S.DECLINED, E.INVITATION, S.DECLINED, (C.SAY_NO,)),
        (S.DELIVERED, E.INVITATION, S.UPLOADING, (C.SAY_YES, C.OFFER_UPDATE)),
        (S.DELIVERED, E.LOST, S.DECLINED, (C.SAY_NO,)),
    ],
)
def test_refusals_and_repairs(state: State, event: Event, after: State, commands: tuple[Command, ...]) -> None:
    assert advance(state, event) == (after, commands)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_an_event_out_of_place_changes_nothing(state: State, event: Event) -> None:
    if (state, event) not in TABLE:
        assert advance(state, event) == (state, ())


@pytest.mark.parametrize("event", list(Event))
def test_closed_is_the_end(event: Event) -> None:
    """A hub that forgot it is told so."""
    assert advance(S.CLOSED, event) == (S.CLOSED, (C.SAY_NO,) if event is E.INVITATION else ())


@pytest.mark.parametrize("event", [E.ADMITTED, E.REFUSED_HERE, E.SEALED, E.FAILED, E.ACCEPTED, E.REJECTED])
def test_the_same_event_twice_is_the_event_once(event: Event) -> None:
    for state in State:
        once, _ = advance(state, event)
        assert advance(once, event) == (once, ())


@pytest.mark.parametrize("state", [s for s in State if s is not S.CLOSED])
def test_every_open_round_can_be_closed_by_the_hub(state: State) -> None:
    assert advance(state, E.CLOSED_BY_HUB)[0] is S.CLOSED


def test_the_clock() -> None:
    deadline = 1000.0
    assert expired(S.TRAINING, deadline, 999.9) is None
    assert expired(S.TRAINING, deadline, 1000.0) is E.DEADLINE
    assert expired(S.UPLOADING, deadline, 1000.0) is None
    assert expired(S.UPLOADING, deadline, 1000.0 + GIVE_UP_AFTER_S) is E.GIVEN_UP
    assert expired(S.CLOSED, deadline, 1e12) is None


@pytest.mark.parametrize("state", [s for s in State if s is not S.CLOSED])
def test_no_open_round_lives_for_ever(state: State) -> None:
    event = expired(state, 0.0, GIVE_UP_AFTER_S)
    assert event is not None
    assert advance(state, event)[0] is S.CLOSED
