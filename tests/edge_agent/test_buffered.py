"""Buffered rounds on the box: trained first, kept in the spool, sealed for the round that has room, and never twice."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_hub import secure_sum
from edge_agent import bundles, config, database, hub_change, invitations, learn, ledger, replay, spool, status
from edge_agent.learner import Learner
from edge_agent.rounds import GIVE_UP_AFTER_S, Event, State
from fleet_link import messages, sealing
from fleet_link.cohort import RoundOf
from fleet_link.errors import LinkError, SiteError
from fleet_link.messages import BASES, RoundAnswer, RoundClosed, RoundKeys, RoundPlan
from fleet_link.sealing import plan_digest
from models import addable, delta, round_layout
from tests.edge_agent.link_support import Box, write_brightness_bundle
from tests.edge_agent.masked_fleet import BODY, ID, NAMES, ROUND, Fleet, Hospitals, Never
from tests.masked_support import changed

SHAPES = {"head.bias": (2,), "head.weight": (2,), "body.weight": (BODY,)}
WIDE = {"word_bits": 32, "value_bits": 16}
Make = Callable[..., Fleet]


class PowerCutError(Exception):
    pass


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    return Hospitals.build(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture
def make(hospitals: Hospitals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A fleet whose round is buffered, over the base of all; what each training taught is kept."""
    made: list[Fleet] = []

    def a_fleet(**fields: Any) -> Fleet:
        fleet = Fleet(hospitals, tmp_path, monkeypatch, **fields)
        made.append(fleet)
        plan_is(fleet, changed(fleet.plan, buffer=5, bases=(fleet.plan.base_digest,)))
        return fleet

    yield a_fleet
    for fleet in made:
        fleet.close()


def plan_is(fleet: Fleet, plan: RoundPlan) -> None:
    fleet.plan = plan
    fleet.layout = round_layout.layout_of(plan, plan_digest(plan), SHAPES)


def work(fleet: Fleet, name: str = "box-1") -> Box:
    """One turn of the learner."""
    box = fleet.box(name)
    learner = Learner(box.config, box.holder, box.enrolled, time.time)
    if fleet.restarts:
        learner.repair(box.db)
    learner.step(box.db, Never())  # type: ignore[arg-type]
    return box


def raw(box: Box) -> delta.Arrays:
    waiting = spool.find(box.db)
    assert waiting is not None
    return spool.load(box.data_dir, waiting, SHAPES)


def files(box: Box) -> list[str]:
    return sorted(path.name for path in (box.data_dir / "spool").glob("*"))


def the_state(fleet: Fleet, round_id: str, name: str = "box-1") -> str:
    return fleet.boxes[name].state_of(round_id)


def close(fleet: Fleet, round_id: str = ROUND, event: Event = Event.CLOSED_BY_HUB, name: str = "box-1") -> None:
    box = fleet.box(name)
    ledger.apply(box.db, box.data_dir, round_id, event, time.time())


def release(fleet: Fleet, *, slope: float) -> str:
    """One that every box has: the hub goes on without whoever is late."""
    path = fleet.folder / f"release-{slope}.bundle"
    digest = write_brightness_bundle(path, slope=slope, body=BODY)
    for box in fleet.boxes.values():
        (box.data_dir / bundles.path_of(digest)).write_bytes(path.read_bytes())
        with database.transaction(box.db):
            bundles.activate(box.db, digest, round(slope), time.time())
    return digest


def next_plan(fleet: Fleet, *bases: str, **changes: Any) -> RoundPlan:
    """Of a second round over the first of `bases`."""
    return changed(fleet.plan, **{"round_id": "round-2", "base_digest": bases[0], "bases": bases} | changes)


# --- the way of a box -----------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
def test_a_masked_buffer_is_summed_to_the_last_bit(make: Make, restarts: bool) -> None:
    fleet = make(restarts=restarts, changes=WIDE)
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


def test_keys_are_said_only_once_there_is_an_update(make: Make) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    assert [type(message) for message in fleet.said("box-1")] == [RoundAnswer]
    box = work(fleet)
    assert [type(message) for message in fleet.said("box-1")] == [RoundAnswer, RoundKeys]
    (path,) = (box.data_dir / "spool").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    fleet.tell("box-1", fleet.plan)  # the hub has lost the answer
    assert fleet.said("box-1")[-1] == fleet.said("box-1")[1]


def late(fleet: Fleet, event: Event = Event.CLOSED_BY_HUB, **changes: Any) -> delta.Arrays:
    """Box-1 trains while the round goes on without it; what it has taught."""
    fleet.tell("box-1", changed(fleet.plan, **changes) if changes else fleet.plan)
    close(fleet, event=event)
    assert fleet.state() == State.LATE
    box = work(fleet)
    assert fleet.state() == State.CLOSED
    return raw(box)


def to_training(fleet: Fleet, plan: RoundPlan) -> None:
    """Round 2 as far as box-1 has to seal. The other boxes are those of the round as well."""
    plan_is(fleet, plan)
    fleet.keys.clear()
    fleet.made.clear()
    for name in NAMES:
        fleet.tell(name, plan)
        work(fleet, name)
    fleet.hear()
    fleet.circle = secure_sum.form_circle(
        RoundOf(plan.round_id, plan_digest(plan)), {name: said.keys for name, said in fleet.keys.items()}, 3
    )
    for name in NAMES:
        fleet.tell(name, fleet.cohort(name))
    fleet.forward()


@pytest.mark.parametrize("event", [Event.CLOSED_BY_HUB, Event.LEFT_OUT, Event.DEADLINE])
@pytest.mark.parametrize("restarts", [False, True])
def test_a_late_update_enters_a_later_sum_once_scaled_by_its_staleness(
    make: Make, event: Event, restarts: bool
) -> None:
    """Two releases on: 1/√3 of the clipped change, with the weight of all its examples."""
    fleet = make(restarts=restarts, changes=WIDE | {"clip_norm": 5.0})
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
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make()
    first = fleet.plan.base_digest
    late(fleet)
    second = release(fleet, slope=11.0)
    monkeypatch.setattr(learn, "train", None)
    fleet.tell("box-1", next_plan(fleet, second, first))
    work(fleet)
    assert the_state(fleet, "round-2") == State.KEYED


def test_a_box_that_is_left_out_with_its_keys_keeps_its_update(make: Make) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    change = raw(work(fleet))
    fleet.tell("box-1", RoundClosed(message_id=ID, round_id=ROUND, outcome="dropped", reason="left out"))
    assert fleet.state() == State.CLOSED
    assert all((raw(fleet.boxes["box-1"])[name] == value).all() for name, value in change.items())


def test_what_no_round_took_for_a_month_is_thrown_away(make: Make) -> None:
    fleet = make()
    late(fleet)
    box = fleet.boxes["box-1"]
    box.db.execute("UPDATE spool SET made_at = made_at - ?", (7 * 86400.0,))
    work(fleet)
    assert len(box.rows("spool")) == 1  # a week is no matter
    box.db.execute("UPDATE spool SET made_at = made_at - ?", (24 * 86400.0,))
    work(fleet)
    assert (box.rows("spool"), files(box)) == ([], [])


def test_a_site_that_learns_no_more_keeps_nothing_it_has_learned(make: Make) -> None:
    fleet = make()
    late(fleet)
    box = fleet.boxes["box-1"]
    fleet.tell("box-1", changed(fleet.plan, round_id="round-3"))
    close(fleet, "round-3")
    box.config = _with_policy(box.config, learn=False)
    work(fleet)
    assert (box.rows("spool"), files(box), the_state(fleet, "round-3")) == ([], [], State.CLOSED)


def test_another_hub_gets_nothing_that_was_trained_for_the_one_before(make: Make) -> None:
    fleet = make()
    late(fleet)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-3"))
    box = fleet.boxes["box-1"]
    database.keep(box.db, hub_change.HUB, 4711)
    hub_change.follow(box.db, box.data_dir, box.enrolled, 0.0)
    assert (box.rows("spool"), the_state(fleet, "round-3")) == ([], State.CLOSED)
    work(fleet)
    assert files(box) == []


def _with_policy(before: config.Config, **changes: Any) -> config.Config:
    return replace(before, policy=replace(before.policy, **changes))


# --- killed ---------------------------------------------------------------------------------------


def test_killed_before_the_row_the_box_trains_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make(restarts=True)
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


def test_killed_while_it_is_sealed_the_update_is_sealed_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has left: the spool goes in the transaction that lets the sealed one go."""
    fleet = make(restarts=True)
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


def test_closed_while_it_trains_the_update_is_for_a_later_round(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    write = spool.write

    def closed_meanwhile(*arguments: Any) -> spool.Spooled:
        close(fleet)
        return write(*arguments)

    monkeypatch.setattr(spool, "write", closed_meanwhile)
    box = work(fleet)
    assert (fleet.state(), len(box.rows("spool")), box.rows("masked_parts")) == (State.CLOSED, 1, [])
    assert not [message for message in fleet.said("box-1") if isinstance(message, RoundKeys)]


def test_a_file_without_its_row_goes(make: Make) -> None:
    fleet = make()
    late(fleet)
    box = fleet.boxes["box-1"]
    (box.data_dir / "spool" / "stray.safetensors").write_bytes(b"x")
    Learner(box.config, box.holder, box.enrolled, time.time).repair(box.db)
    assert files(box) == [f"{ROUND}.safetensors"]


@pytest.mark.parametrize("damage", ["lost", "flipped", "empty", "other tensors"])
def test_a_damaged_spool_ends_a_masked_round_here_and_teaches_nobody(make: Make, damage: str) -> None:
    fleet = make()
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


# --- open rounds ----------------------------------------------------------------------------------


def open_round(fleet: Fleet) -> Box:
    """As far as its update is on its way."""
    box = fleet.boxes["box-1"]
    box.config = _with_policy(box.config, allow_unsafe_open_rounds=True)
    fleet.plan = changed(fleet.plan, kind="unsafe_open", value_bits=16)
    fleet.tell("box-1", fleet.plan)
    work(fleet)
    assert fleet.state() == State.TRAINING
    work(fleet)
    assert fleet.state() == State.UPLOADING
    return box


def opened(fleet: Fleet, box: Box, plan: RoundPlan) -> delta.Arrays:
    """As the hub reads it."""
    (transfer,) = box.rows("transfers_out")
    sealed = (box.data_dir / transfer["path"]).read_bytes()
    update = sealing.open_update(
        sealed,
        private_key=fleet.key,
        trust=fleet.authority.trust,
        sender="box-1",
        plan=plan,
        now=time.time(),
    )
    return delta.decode(update.payload, SHAPES)


@pytest.mark.parametrize("event", [Event.REJECTED, Event.LEFT_OUT])
def test_what_an_open_round_had_no_room_for_is_sealed_anew_for_the_next(make: Make, event: Event) -> None:
    fleet = make(changes={"clip_norm": 1000.0})
    box = open_round(fleet)
    before = opened(fleet, box, fleet.plan)
    first = fleet.plan.base_digest
    close(fleet, event=event)
    assert (fleet.state(), len(box.rows("spool"))) == (State.CLOSED, 1)
    plan = next_plan(fleet, release(fleet, slope=11.0), first)
    fleet.tell("box-1", plan)
    work(fleet)
    work(fleet)
    again = opened(fleet, box, plan)
    step = max(float(np.abs(value).max()) for value in before.values()) / 60  # two roundings to 8 bits
    for name in again:
        assert again[name] == pytest.approx(before[name] / np.sqrt(2.0), abs=step)


@pytest.mark.parametrize("event", [Event.ACCEPTED, Event.CLOSED_BY_HUB, Event.GIVEN_UP])
def test_an_open_update_that_may_have_been_counted_is_not_sent_again(make: Make, event: Event) -> None:
    fleet = make()
    box = open_round(fleet)
    close(fleet, event=event)
    assert box.rows("spool") == []


def test_while_an_open_update_may_be_counted_the_next_buffer_waits_for_word_of_it(make: Make) -> None:
    """The hub has counted it, and its receipt and the end of its round were lost."""
    fleet = make(changes={"clip_norm": 1000.0})
    box = open_round(fleet)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    work(fleet)
    assert the_state(fleet, "round-2") == State.INVITED
    close(fleet)
    assert (box.rows("spool"), box.rows("transfers_out")) == ([], [])


def test_an_open_update_that_is_to_be_sealed_again_goes_where_its_round_was_released(make: Make) -> None:
    fleet = make()
    box = open_round(fleet)
    known = ledger.find(box.db, ROUND)
    assert known is not None
    ledger.lose_update(box.db, box.data_dir, known, "sealed with the certificate before", time.time())
    assert fleet.state() == State.TRAINING
    close(fleet)
    assert box.rows("spool") == []


def test_of_an_open_round_asked_for_again_the_next_update_in_the_spool_is_not_dropped(make: Make) -> None:
    """A hub restored from its backup asks for what it had counted; another update is in the spool by then."""
    fleet = make()
    box = open_round(fleet)
    close(fleet, event=Event.ACCEPTED)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    close(fleet, "round-2")
    work(fleet)
    (late,) = box.rows("spool")
    fleet.tell("box-1", fleet.plan)
    assert fleet.state() == State.UPLOADING
    close(fleet, event=Event.ACCEPTED)
    assert box.rows("spool") == [late]


def test_what_the_hub_may_have_read_hides_nobody_in_a_masked_sum(make: Make) -> None:
    """A hub that reads updates in an open round, refuses them, and subtracts them from the masked sum that follows."""
    fleet = make()
    box = open_round(fleet)
    close(fleet, event=Event.REJECTED)
    (seen,) = box.rows("spool")
    fleet.tell("box-1", changed(fleet.plan, kind="masked", value_bits=12, round_id="round-2"))
    work(fleet)
    (now,) = box.rows("spool")
    assert (seen["is_shown"], now["is_shown"]) == (1, 0)
    assert now["sha256"] != seen["sha256"]


# --- a hub that lies ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bases": ()}, "bases do not begin with its own"),
        ({"bases": ("f" * 64,)}, "bases do not begin with its own"),
        ({"bases": (None, "f" * 64, "f" * 64)}, "or list one twice"),
        ({"buffer": 6}, "a buffer of 6, and at least 3, at most 5 boxes"),
        ({"buffer": 2}, "a buffer of 2, and at least 3, at most 5 boxes"),
        ({"buffer": 0}, "is of no buffered round"),
        ({"share": 0.5}, "an older update would be of another drawn share"),
    ],
)
def test_a_plan_no_honest_hub_makes_is_declined(make: Make, changes: dict[str, Any], reason: str) -> None:
    fleet = make()
    if "bases" in changes:
        changes = {"bases": tuple(base or fleet.plan.base_digest for base in changes["bases"])}
    fleet.tell("box-1", changed(fleet.plan, **changes))
    (answer,) = fleet.said("box-1")
    assert isinstance(answer, RoundAnswer)
    assert not answer.joins
    assert reason in answer.reason


def test_a_list_of_bases_without_end_is_not_read(make: Make) -> None:
    plan = make().plan
    bases = tuple(f"{number:064x}" for number in range(BASES + 1))
    with pytest.raises(LinkError):
        messages.decode(msgspec.msgpack.encode(changed(plan, bases=bases)))


def test_an_update_over_a_base_that_the_hub_does_not_list_is_thrown_away_and_trained_anew(make: Make) -> None:
    fleet = make()
    change = late(fleet)
    second = release(fleet, slope=11.0)
    fleet.tell("box-1", next_plan(fleet, second, "f" * 64))
    box = work(fleet)
    assert the_state(fleet, "round-2") == State.KEYED
    (row,) = box.rows("spool")
    assert (row["base_digest"], row["round_id"], files(box)) == (second, "round-2", ["round-2.safetensors"])
    assert any((raw(box)[name] != value).any() for name, value in change.items())


@pytest.mark.parametrize(
    "policy", [{"tasks": ("CT",)}, {"min_examples": 4}, {"weights_may_leave": ("heads",)}], ids=str
)
def test_what_the_site_forbids_since_is_not_taken_from_the_spool(make: Make, policy: dict[str, Any]) -> None:
    fleet = make()
    first = fleet.plan.base_digest
    late(fleet)
    box = fleet.boxes["box-1"]
    box.config = _with_policy(box.config, **policy)
    fleet.tell("box-1", next_plan(fleet, release(fleet, slope=11.0), first))
    work(fleet)
    assert the_state(fleet, "round-2") == State.DECLINED


def seal_round_2(fleet: Fleet, plan: RoundPlan) -> None:
    to_training(fleet, plan)
    fleet.train("box-1")


def open_round_2(fleet: Fleet) -> None:
    box = fleet.boxes["box-1"]
    for event in (Event.ACCEPTED, Event.SURVIVORS_SIGNED, Event.UNMASK_GIVEN):
        part = ledger.part_of(box.db, "round-2")
        ledger.apply(box.db, box.data_dir, "round-2", event, time.time(), ledger.Outcome(part=part))
    for name in NAMES:
        close(fleet, "round-2", name=name)


def test_of_a_stale_update_the_base_it_was_trained_from_counts_for_the_next_sum(make: Make) -> None:
    """Two sums whose difference could be one site's update: over the first base there was one, though no plan was over it."""
    fleet = make()
    first = fleet.plan.base_digest
    late(fleet)
    second = release(fleet, slope=11.0)
    seal_round_2(fleet, next_plan(fleet, second, first))
    open_round_2(fleet)
    third = next_plan(fleet, first, round_id="round-3", buffer=0, bases=())
    fleet.tell("box-1", third)
    answer = fleet.said("box-1")[-1]
    assert isinstance(answer, RoundAnswer)
    assert "may have been opened before, and 0 verdicts are new since" in answer.reason
    fleet.tell("box-1", changed(third, round_id="round-4", base_digest=second))
    assert the_state(fleet, "round-4") == State.KEYED


def late_after_round_2(fleet: Fleet, base: str) -> None:
    """Box-1 could not train for its first round before its update for a second one, over `base`, was sealed."""
    box = fleet.boxes["box-1"]
    fleet.tell("box-1", fleet.plan)
    box.db.execute("UPDATE rounds SET state = 'declined'")
    seal_round_2(fleet, changed(fleet.plan, round_id="round-2", base_digest=base, buffer=0, bases=()))
    box.db.execute("UPDATE rounds SET state = 'late' WHERE round_id = ?", (ROUND,))
    work(fleet)
    open_round_2(fleet)


def test_an_update_over_a_base_of_an_opened_sum_is_thrown_away(make: Make) -> None:
    """As a second round over that base would be declined: the difference of the two sums could be one site's update."""
    fleet = make()
    first = fleet.plan.base_digest
    late(fleet)
    box, second = fleet.boxes["box-1"], release(fleet, slope=11.0)
    (row,) = box.rows("spool")
    replay.note_opened(box.db, ROUND)
    replay.keep_learned(box.db, ROUND, learn.examples(box.db, box.config.policy.tasks, "train"))
    assert row["base_digest"] == first
    fleet.tell("box-1", next_plan(fleet, second, first, round_id="round-3", buffer=5))
    work(fleet)
    assert [row["base_digest"] for row in box.rows("spool")] == [second]


def test_late_training_over_the_base_of_an_earlier_sum_is_not_done(make: Make) -> None:
    fleet = make()
    late_after_round_2(fleet, fleet.plan.base_digest)
    assert fleet.boxes["box-1"].rows("spool") == []


def test_joined_for_its_spool_a_box_does_not_train_where_it_would_not_have_joined(make: Make) -> None:
    fleet = make()
    first, second = fleet.plan.base_digest, release(fleet, slope=11.0)
    late_after_round_2(fleet, second)
    fleet.tell("box-1", next_plan(fleet, second, first, round_id="round-3", buffer=5))
    assert the_state(fleet, "round-3") == State.PREPARING
    fleet.boxes["box-1"].db.execute("DELETE FROM spool")
    work(fleet)
    assert the_state(fleet, "round-3") == State.DECLINED
    assert "0 of its verdicts are new since a sum over its base may have been opened" in the_no(fleet)


def the_no(fleet: Fleet) -> str:
    answer = [message for message in fleet.said("box-1") if isinstance(message, RoundAnswer)][-1]
    assert not answer.joins
    return answer.reason


def test_late_training_makes_room_for_a_round_that_needs_its_update_now(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go with the other's seal anyway."""
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    box = fleet.boxes["box-1"]
    asked: list[bool] = []

    def train(*arguments: Any) -> learn.Trained:
        stopped = arguments[-1]
        asked.append(stopped())
        fleet.tell("box-1", changed(fleet.plan, round_id="round-2", buffer=0, bases=()))
        box.db.execute("UPDATE rounds SET state = 'training' WHERE round_id = 'round-2'")
        asked.append(stopped())
        raise learn.TrainingStoppedError

    monkeypatch.setattr(learn, "train", train)
    work(fleet)
    assert asked == [False, True]
    assert fleet.state() == State.LATE


def test_late_training_is_not_begun_while_another_round_is_held_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    box = fleet.boxes["box-1"]
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2", buffer=0, bases=()))
    box.db.execute("UPDATE rounds SET state = 'training' WHERE round_id = 'round-2'")
    begun: list[str] = []

    def train(plan: RoundPlan, *_: Any) -> learn.Trained:
        begun.append(plan.round_id)
        raise SiteError("the disk is full")

    monkeypatch.setattr(learn, "train", train)
    learner = Learner(box.config, box.holder, box.enrolled, time.time)
    for _ in range(3):
        learner.step(box.db, Never())
    assert begun == ["round-2"]


def test_what_is_in_the_spool_stays_until_it_is_dropped(make: Make) -> None:
    fleet = make()
    change = late(fleet)
    box = fleet.boxes["box-1"]
    spool.keep(box.db, spool.write(box.data_dir, changed(fleet.plan, round_id="other"), change, (3, ()), 0.0))
    (row,) = box.rows("spool")
    assert row["round_id"] == ROUND
    work(fleet)
    assert files(box) == [f"{ROUND}.safetensors"]


def test_an_update_in_the_spool_goes_with_the_next_one_that_is_sealed(make: Make) -> None:
    """Else what it learned would stand in two sums."""
    fleet = make()
    late(fleet)
    plan = changed(fleet.plan, round_id="round-2", buffer=0, bases=())
    to_training(fleet, plan)
    fleet.train("box-1")
    box = fleet.boxes["box-1"]
    assert (the_state(fleet, "round-2"), box.rows("spool")) == (State.UPLOADING, [])


def test_a_masked_round_waits_while_another_is_prepared(make: Make) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    assert the_state(fleet, "round-2") == State.INVITED
    close(fleet)
    box = fleet.boxes["box-1"]
    invitations.judge_waiting(box.db, box.config, box.enrolled.identity, time.time())
    assert the_state(fleet, "round-2") == State.PREPARING


def test_a_late_training_never_takes_the_place_of_what_a_round_counts_on(make: Make) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    fleet.tell("box-1", changed(fleet.plan, round_id="round-2"))
    box = fleet.boxes["box-1"]
    box.db.execute("UPDATE rounds SET state = 'declined' WHERE round_id = ?", (ROUND,))
    work(fleet)
    (before,) = box.rows("spool")
    box.db.execute("UPDATE rounds SET state = 'late' WHERE round_id = ?", (ROUND,))
    work(fleet)
    assert box.rows("spool") == [before]
    assert (fleet.state(), the_state(fleet, "round-2")) == (State.CLOSED, State.KEYED)


def test_a_round_that_is_on_is_trained_for_before_one_that_is_over(make: Make) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    fleet.tell("box-1", next_plan(fleet, release(fleet, slope=11.0), fleet.plan.base_digest))
    (row,) = work(fleet).rows("spool")
    assert row["round_id"] == "round-2"
    assert (fleet.state(), the_state(fleet, "round-2")) == (State.CLOSED, State.KEYED)


def test_the_privacy_pledge_of_a_late_box_is_given_back(make: Make) -> None:
    noisy = WIDE | {"noise": 1.0, "noise_boxes": 3}
    fleet = make(changes=noisy, policy={"epsilon_max": 1000.0})
    fleet.tell("box-1", fleet.plan)
    box = fleet.boxes["box-1"]
    assert [row["is_spent"] for row in box.rows("privacy_costs")] == [0]
    close(fleet)
    work(fleet)
    assert (box.rows("privacy_costs"), len(box.rows("spool"))) == ([], 1)


def test_a_box_that_never_ends_its_training_is_given_up(make: Make) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    close(fleet)
    box = fleet.boxes["box-1"]
    invitations.close_expired(box.db, box.data_dir, fleet.plan.deadline_unix_s + 1)
    assert fleet.state() == State.LATE
    invitations.close_expired(box.db, box.data_dir, fleet.plan.deadline_unix_s + GIVE_UP_AFTER_S)
    assert fleet.state() == State.CLOSED
