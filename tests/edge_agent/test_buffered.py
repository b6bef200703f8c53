"""Buffered rounds on the box: trained first, kept in the spool, sealed for the round that has room, and never twice."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_agent import database, hub_change, learn, spool, status
from edge_agent.learner import Learner
from edge_agent.rounds import Event, State
from fleet_link.messages import RoundAnswer, RoundClosed, RoundKeys
from models import addable, delta
from tests.edge_agent.buffered_fleet import (
    SHAPES,
    WIDE,
    close,
    files,
    last_no,
    late,
    next_plan,
    raw,
    release,
    the_state,
    to_training,
    with_policy,
    work,
)
from tests.edge_agent.masked_fleet import ID, NAMES, ROUND, Fleet
from tests.masked_support import changed

Make = Callable[..., Fleet]


class PowerCutError(Exception):
    pass


# --- the way of a box -----------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
def test_a_masked_buffer_is_summed_to_the_last_bit(make_buffered: Make, restarts: bool) -> None:
    fleet = make_buffered(restarts=restarts, changes=WIDE)
    fleet.invite()
    assert fleet.states() == {State.PREPARING}
    taught = {name: raw(work(fleet, name)) for name in NAMES}
    assert fleet.states() == {State.KEYED}
    fleet.form()
    fleet.forward()
    assert fleet.states() == {State.TRAINING}
    fleet.collect()
    fleet.tell_survivors()
    fleet.agree()
    total = fleet.sum()
    assert (total == fleet.plain_sum()).all()
    mean = addable.decode_sum(total, fleet.layout)
    for tensor in mean:
        expected = np.mean([delta.clip(taught[name], 20.0)[0][tensor] for name in NAMES], axis=0)
        assert mean[tensor] == pytest.approx(expected, abs=0.01)
    assert all((files(box), box.rows("spool")) == ([], []) for box in fleet.boxes.values())


def test_keys_are_said_only_once_there_is_an_update(make_buffered: Make) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    assert [type(message) for message in fleet.said("box-1")] == [RoundAnswer]
    box = work(fleet)
    assert [type(message) for message in fleet.said("box-1")] == [RoundAnswer, RoundKeys]
    (path,) = (box.data_dir / "spool").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    fleet.tell("box-1", fleet.plan)  # the hub has lost the answer
    assert fleet.said("box-1")[-1] == fleet.said("box-1")[1]


@pytest.mark.parametrize("event", [Event.CLOSED_BY_HUB, Event.LEFT_OUT, Event.DEADLINE])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_late_update_enters_a_later_sum_once_scaled_by_its_staleness(
    make_buffered: Make, event: Event, restarts: bool
) -> None:
    """Two releases on: 1/√3 of the clipped change, with the weight of all its examples."""
    fleet = make_buffered(restarts=restarts, changes=WIDE | {"clip_norm": 5.0})
    first = fleet.plan.base_digest
    change = late(fleet, event)
    assert delta.norm(change) > 10.0
    second, third = release(fleet, slope=11.0), release(fleet, slope=12.0)
    to_training(fleet, next_plan(fleet, third, second, first))
    assert {the_state(fleet, "round-2", name) for name in NAMES} == {State.TRAINING}
    fleet.train("box-1")
    words = fleet.words["box-1"]
    assert words[0] == 255  # three examples, and the cap is three
    sent = addable.decode_sum(words, fleet.layout, boxes=1)
    clipped, _ = delta.clip(change, 5.0)
    for name in sent:
        assert sent[name] == pytest.approx(clipped[name] / np.sqrt(3.0), abs=0.01)
    box = fleet.boxes["box-1"]
    assert (the_state(fleet, "round-2"), files(box), box.rows("spool")) == (State.UPLOADING, [], [])
    (stale,) = box.rows("stale_updates")
    assert (stale["round_id"], stale["base_digest"], stale["staleness"]) == ("round-2", first, 2)
    shown = {row["round_id"]: row["staleness"] for row in status._rounds(box.db)}
    assert shown == {"round-2": 2, ROUND: None}


def test_a_straggler_goes_first_into_the_next_buffer_without_training(
    make_buffered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_buffered()
    first = fleet.plan.base_digest
    late(fleet)
    second = release(fleet, slope=11.0)
    monkeypatch.setattr(learn, "train", None)
    fleet.tell("box-1", next_plan(fleet, second, first))
    work(fleet)
    assert the_state(fleet, "round-2") == State.KEYED


def test_a_box_that_is_left_out_with_its_keys_keeps_its_update(make_buffered: Make) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    change = raw(work(fleet))
    fleet.tell("box-1", RoundClosed(message_id=ID, round_id=ROUND, outcome="dropped", reason="left out"))
    assert fleet.state() == State.CLOSED
    assert all((raw(fleet.boxes["box-1"])[name] == value).all() for name, value in change.items())


def test_what_no_round_took_for_a_month_is_thrown_away(make_buffered: Make) -> None:
    fleet = make_buffered()
    late(fleet)
    box = fleet.boxes["box-1"]
    box.db.execute("UPDATE spool SET made_at = made_at - ?", (7 * 86400.0,))
    work(fleet)
    assert len(box.rows("spool")) == 1  # a week is no matter
    box.db.execute("UPDATE spool SET made_at = made_at - ?", (24 * 86400.0,))
    work(fleet)
    assert (box.rows("spool"), files(box)) == ([], [])


def test_a_training_that_diverged_leaves_nothing_in_the_spool(
    make_buffered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later round could send it either."""
    fleet = make_buffered()
    broken = {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()}
    monkeypatch.setattr(learn, "train", lambda *_: learn.Trained(broken, learn.Report(3, 0, 0, 0, 0.1, 1)))
    fleet.tell("box-1", fleet.plan)
    box = work(fleet)
    assert (fleet.state(), box.rows("spool"), files(box)) == (State.DECLINED, [], [])
    assert "not finite" in last_no(fleet)


def test_a_site_that_learns_no_more_keeps_nothing_it_has_learned(make_buffered: Make) -> None:
    fleet = make_buffered()
    late(fleet)
    box = fleet.boxes["box-1"]
    fleet.tell("box-1", changed(fleet.plan, round_id="round-3"))
    close(fleet, "round-3")
    box.config = with_policy(box.config, learn=False)
    work(fleet)
    assert (box.rows("spool"), files(box), the_state(fleet, "round-3")) == ([], [], State.CLOSED)


def test_another_hub_gets_nothing_that_was_trained_for_the_one_before(make_buffered: Make) -> None:
    fleet = make_buffered()
    late(fleet)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-3"))
    box = fleet.boxes["box-1"]
    database.keep(box.db, hub_change.HUB, 4711)
    hub_change.follow(box.db, box.data_dir, box.enrolled, 0.0)
    assert (box.rows("spool"), the_state(fleet, "round-3")) == ([], State.CLOSED)
    work(fleet)
    assert files(box) == []


# --- killed ---------------------------------------------------------------------------------------


def test_killed_before_the_row_the_box_trains_again(make_buffered: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make_buffered(restarts=True)
    fleet.tell("box-1", fleet.plan)

    def cut(*_: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as power:
        power.setattr(spool, "keep", cut)
        with pytest.raises(PowerCutError):
            work(fleet)
    box = fleet.boxes["box-1"]
    assert (fleet.state(), files(box), box.rows("spool")) == (State.PREPARING, [f"{ROUND}.safetensors"], [])
    assert box.rows("masked_parts") == []
    work(fleet)
    assert (fleet.state(), len(box.rows("spool"))) == (State.KEYED, 1)


def test_killed_while_it_is_sealed_the_update_is_sealed_again(
    make_buffered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has left: the spool goes in the transaction that lets the sealed one go."""
    fleet = make_buffered(restarts=True)
    fleet.invite()
    for name in NAMES:
        work(fleet, name)
    fleet.form()
    fleet.forward()
    change = raw(fleet.boxes["box-1"])

    def cut(*_: object) -> None:
        raise PowerCutError

    with monkeypatch.context() as power:
        power.setattr(spool, "drop", cut)
        with pytest.raises(PowerCutError):
            work(fleet)
    box = fleet.boxes["box-1"]
    assert (fleet.state(), box.rows("transfers_out")) == (State.TRAINING, [])
    assert all((raw(box)[name] == value).all() for name, value in change.items())
    fleet.collect()
    fleet.tell_survivors()
    fleet.agree()
    assert (fleet.sum() == fleet.plain_sum()).all()


def test_closed_while_it_trains_the_update_is_for_a_later_round(
    make_buffered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_buffered()
    fleet.tell("box-1", fleet.plan)
    write = spool.write

    def closed_meanwhile(*arguments: Any) -> spool.Spooled:
        close(fleet)
        return write(*arguments)

    monkeypatch.setattr(spool, "write", closed_meanwhile)
    box = work(fleet)
    assert (fleet.state(), len(box.rows("spool")), box.rows("masked_parts")) == (State.CLOSED, 1, [])
    assert not [message for message in fleet.said("box-1") if isinstance(message, RoundKeys)]


def test_a_file_without_its_row_goes(make_buffered: Make) -> None:
    fleet = make_buffered()
    late(fleet)
    box = fleet.boxes["box-1"]
    (box.data_dir / "spool" / "stray.safetensors").write_bytes(b"x")
    Learner(box.config, box.holder, box.enrolled, time.time).repair(box.db)
    assert files(box) == [f"{ROUND}.safetensors"]


@pytest.mark.parametrize("damage", ["lost", "flipped", "empty", "other tensors"])
def test_a_damaged_spool_ends_a_masked_round_here_and_teaches_nobody(make_buffered: Make, damage: str) -> None:
    fleet = make_buffered()
    fleet.invite()
    for name in NAMES:
        work(fleet, name)
    fleet.form()
    fleet.forward()
    box = fleet.boxes["box-1"]
    path = box.data_dir / "spool" / f"{ROUND}.safetensors"
    if damage == "lost":
        path.unlink()
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "empty":
        box.db.execute("DELETE FROM spool")
    else:
        plan = changed(fleet.plan, round_id=ROUND)
        made = spool.write(box.data_dir, plan, {"head.bias": np.zeros(2, np.float32)}, (3, ()), 0.0)
        box.db.execute("UPDATE spool SET sha256 = ?", (made.sha256,))
    work(fleet)
    assert fleet.state() == State.DECLINED
    assert (box.rows("spool"), box.rows("transfers_out"), box.rows("masked_parts")) == ([], [], [])
    work(fleet)
    assert files(box) == []
