"""When a plan is judged: now, after the verdicts just given have become examples, or when its base has arrived."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import invitations, learn, ledger
from edge_agent.rounds import GIVE_UP_AFTER_S, Event, State
from fleet_link.messages import RoundAnswer
from tests.edge_agent.link_support import Box, make_box, make_plan
from tests.fleet_link.mosquitto_support import TestAuthority

AUTHORITY = TestAuthority()
NOW = time.time()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = make_box(tmp_path, AUTHORITY)
    yield made
    made.db.close()


def invite(box: Box, **changes: object) -> None:
    plan = make_plan(str(changes.pop("base_digest", box.holder.current.digest)), b"k" * 32, **changes)
    invitations.take(box.db, box.config, box.enrolled.identity, plan, NOW)


def collect(box: Box) -> None:
    learn.collect(box.db, box.data_dir, box.holder.current.reader.bundle.manifest, 0.25)
    box.db.execute("UPDATE examples SET split = 'train'")


def test_verdicts_just_given_become_examples_first(box: Box) -> None:
    for number in range(3):
        box.add_reviewed(f"p{number}", bright=True, label="nodule")
    invite(box)
    assert box.state_of("round-1") == State.INVITED
    collect(box)
    invitations.judge_waiting(box.db, box.config, box.enrolled.identity, NOW + 1)
    assert box.state_of("round-1") == State.TRAINING
    assert box.rows("rounds")[0]["examples"] == 3


def test_a_verdict_that_never_becomes_an_example_holds_up_nothing(box: Box) -> None:
    box.add_reviewed("p1", bright=True, label="nodule")
    (box.data_dir / "p1.dcm").write_bytes(b"damaged")
    collect(box)
    invite(box)
    assert box.state_of("round-1") == State.INVITED
    invitations.judge_waiting(box.db, box.config, box.enrolled.identity, NOW + invitations.SETTLING_S)
    assert box.state_of("round-1") == State.DECLINED
    assert "needs 2" in box.rows("rounds")[0]["reason"]


def test_too_few_verdicts_are_declined_at_once(box: Box) -> None:
    box.add_reviewed("p1", bright=True, label="nodule")
    collect(box)
    invite(box)
    assert box.state_of("round-1") == State.DECLINED


def test_what_examples_would_not_change_is_declined_at_once(tmp_path: Path) -> None:
    box = make_box(tmp_path, AUTHORITY, policy={"learn": False})
    box.add_reviewed("p1", bright=True, label="nodule")
    invite(box)
    assert "policy.learn" in box.rows("rounds")[0]["reason"]


def test_a_task_the_site_does_not_learn_gives_no_examples(tmp_path: Path) -> None:
    box = make_box(tmp_path, AUTHORITY, policy={"tasks": ["CT"]})
    for number in range(3):
        box.add_reviewed(f"p{number}", bright=True, label="nodule")
    collect(box)
    invite(box)
    assert "0 reviewed examples for CT" in box.rows("rounds")[0]["reason"]


def test_an_unknown_base_is_declined(box: Box) -> None:
    invite(box, base_digest="b" * 64)
    assert "base bundle" in box.rows("rounds")[0]["reason"]


def test_the_clock_closes_what_is_left_open(box: Box) -> None:
    invite(box, base_digest="b" * 64, deadline_unix_s=NOW + 10)
    invitations.close_expired(box.db, box.data_dir, NOW + 9)
    assert box.state_of("round-1") == State.DECLINED
    invitations.close_expired(box.db, box.data_dir, NOW + 10 + GIVE_UP_AFTER_S)
    assert box.state_of("round-1") == State.CLOSED


# --- a hub restored from a backup -----------------------------------------------------------------


def deliver(box: Box) -> Path:
    """As far as the hub's receipt for the update; the answers were received too."""
    for number in range(3):
        box.add_reviewed(f"p{number}", bright=True, label="nodule")
    collect(box)
    invite(box)
    update = box.data_dir / "updates" / "round-1.sealed"
    update.parent.mkdir()
    update.write_bytes(b"sealed")
    offer = ledger.offer_of(update, "round-1", "box-1")
    sealed = ledger.Outcome(update=offer, update_path="updates/round-1.sealed")
    ledger.apply(box.db, box.data_dir, "round-1", Event.SEALED, NOW, sealed)
    ledger.apply(box.db, box.data_dir, "round-1", Event.ACCEPTED, NOW)
    box.db.execute("DELETE FROM link_outbox")
    return update


def answers(box: Box) -> list[tuple[bool, str]]:
    return [(said.joins, said.reason) for said in ledger.pending(box.db) if isinstance(said, RoundAnswer)]


def test_a_delivered_update_that_the_hub_forgot_is_offered_again(box: Box) -> None:
    update = deliver(box)
    for _ in range(2):
        invite(box)
        assert box.state_of("round-1") == State.UPLOADING
    assert answers(box) == [(True, "")]
    (transfer,) = box.rows("transfers_out")
    assert (transfer["path"], transfer["size"]) == ("updates/round-1.sealed", update.stat().st_size)


def test_a_delivered_update_that_is_gone_is_declined_with_the_reason(box: Box) -> None:
    deliver(box).unlink()
    invite(box)
    assert box.state_of("round-1") == State.DECLINED
    assert answers(box) == [(False, "this box has delivered its update and does not have it any more")]


def test_a_closed_round_is_declined_with_the_reason(box: Box) -> None:
    deliver(box)
    ledger.apply(box.db, box.data_dir, "round-1", Event.CLOSED_BY_HUB, NOW)
    invite(box)
    assert box.state_of("round-1") == State.CLOSED
    assert answers(box) == [(False, "the round is over on this box")]
