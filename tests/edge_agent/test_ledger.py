"""Rows of rounds and of what is to be said: all of an event or nothing, and never two answers to one question."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import ledger
from edge_agent.ledger import Outcome
from edge_agent.rounds import Event, State
from fleet_link.errors import LinkError
from fleet_link.messages import RoundAnswer, RoundPlan
from tests.edge_agent.link_support import Box, make_box, make_plan
from tests.fleet_link.mosquitto_support import TestAuthority

AUTHORITY = TestAuthority()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = make_box(tmp_path, AUTHORITY)
    ledger.invite(made.db, make_plan("a" * 64, b"k" * 32), time.time())
    yield made
    made.db.close()


def apply(box: Box, event: Event, **outcome: object) -> State | None:
    return ledger.apply(box.db, box.data_dir, "round-1", event, time.time(), Outcome(**outcome))  # type: ignore[arg-type]


def answers(box: Box) -> list[RoundAnswer]:
    return [message for message in ledger.pending(box.db) if isinstance(message, RoundAnswer)]


def test_an_event_is_stored_whole_or_not_at_all(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill between two statements would leave: the transaction is rolled back."""

    def power_cut(*_: object) -> None:
        raise LinkError("cut")

    monkeypatch.setattr(ledger, "enqueue", power_cut)
    with pytest.raises(LinkError):
        apply(box, Event.ADMITTED, examples=8)
    monkeypatch.undo()
    assert box.state_of("round-1") == State.INVITED
    assert apply(box, Event.ADMITTED, examples=8) is State.TRAINING
    assert [answer.examples for answer in answers(box)] == [8]


def test_a_no_replaces_a_yes_that_still_waits(box: Box) -> None:
    apply(box, Event.ADMITTED, examples=8)
    apply(box, Event.FAILED, reason="out of memory")
    (answer,) = answers(box)
    assert (answer.joins, answer.reason) == (False, "out of memory")


def test_the_same_answer_again_is_one_answer(box: Box) -> None:
    apply(box, Event.ADMITTED, examples=8)
    apply(box, Event.INVITATION)
    apply(box, Event.INVITATION)
    assert len(answers(box)) == 1
    assert ledger.received(box.db, answers(box)[0].message_id)
    assert not ledger.received(box.db, "f" * 32)
    apply(box, Event.INVITATION)
    assert len(answers(box)) == 1


def test_a_long_reason_fits_the_wire(box: Box) -> None:
    apply(box, Event.REFUSED_HERE, reason="ä" * 2000)
    assert len(answers(box)[0].reason) == ledger.MAX_REASON_CHARACTERS


def test_an_unknown_round_has_no_state(box: Box) -> None:
    assert ledger.apply(box.db, box.data_dir, "never", Event.CLOSED_BY_HUB, 0.0) is None


def test_the_first_plan_of_a_round_counts(box: Box) -> None:
    again = ledger.invite(box.db, make_plan("a" * 64, b"k" * 32, epochs=99), 0.0)
    assert again.plan.epochs == 1
    assert isinstance(again.plan, RoundPlan)


def test_stray_updates_go_and_those_of_open_rounds_stay(box: Box) -> None:
    updates = box.data_dir / "updates"
    updates.mkdir()
    for name in ("round-1.sealed", "stray.sealed", ".round-1.sealed.x.tmp"):
        (updates / name).write_bytes(b"x")
    apply(box, Event.ADMITTED)
    apply(box, Event.SEALED, update_path="updates/round-1.sealed")
    ledger.remove_stray_updates(box.db, box.data_dir)
    assert [path.name for path in updates.iterdir()] == ["round-1.sealed"]
