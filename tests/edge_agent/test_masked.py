"""The box's side of a masked round on real rows: each stage once, twice, late, wrong, and killed between any two."""

from collections.abc import Callable

import numpy as np
import pytest

from edge_agent import database, hub_change, invitations, learn, ledger, masking, replay, update
from edge_agent.rounds import GIVE_UP_AFTER_S, State
from edge_agent.transfers import Transfers
from fleet_link import messages
from fleet_link.messages import RoundAnswer, RoundKeys, Unmask
from models import addable
from tests.edge_agent.link_support import make_plan
from tests.edge_agent.masked_fleet import BODY, NAMES, ROUND, Fleet, is_out, kinds, on_disk, secrets_of, the_no
from tests.masked_support import changed

STAGES = ("keyed", "shared", "training", "uploading", "delivered", "agreed", "unmasked")
WITH_UPDATE = ("uploading", "delivered", "agreed", "unmasked")
Make = Callable[..., Fleet]


# --- a round that goes well -----------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("bits", [{}, {"word_bits": 32, "value_bits": 16, "share": 0.5}])
def test_the_hub_reads_the_sum_to_the_last_bit(make: Make, restarts: bool, bits: dict[str, object]) -> None:
    fleet = make(restarts=restarts, changes=bits)
    for stage, step in {
        "keyed": fleet.invite,
        "shared": fleet.form,
        "training": fleet.forward,
        "delivered": fleet.collect,
        "agreed": fleet.tell_survivors,
        "unmasked": fleet.agree,
    }.items():
        step()
        assert fleet.states() == {stage}
    total = fleet.sum()
    assert (total == fleet.plain_sum()).all()
    assert not any((np.frombuffer(fleet.uploads[name], total.dtype) == fleet.words[name]).all() for name in NAMES)
    secrets = secrets_of(fleet)
    assert on_disk(fleet, secrets) == [True] * 3
    fleet.close_round()
    assert fleet.states() == {State.CLOSED}
    box = fleet.boxes["box-1"]
    assert (box.rows("masked_parts"), box.rows("link_outbox"), box.rows("transfers_out")) == ([], [], [])
    assert not list((box.data_dir / "updates").iterdir())
    assert on_disk(fleet, secrets) == [False] * 3
    assert replay.learned_up_to(box.db) == {"XR": 3}


@pytest.mark.parametrize(("share", "moved"), [(1.0, BODY), (0.1, BODY // 10)])
def test_the_sum_is_the_mean_of_what_the_boxes_learned(make: Make, share: float, moved: int) -> None:
    fleet = make(changes={"word_bits": 32, "value_bits": 16, "share": share})
    fleet.to_stage("unmasked")
    mean = addable.decode_sum(fleet.sum(), fleet.layout)
    for name in mean:
        expected = np.mean([fleet.deltas[box][name] for box in NAMES], axis=0)
        assert mean[name] == pytest.approx(expected, abs=0.01)
    assert np.count_nonzero(mean["body.weight"]) == moved
    assert all(mean[name].all() for name in ("head.bias", "head.weight"))


def test_a_share_of_the_weights_is_a_share_of_the_bytes(make: Make) -> None:
    fleet = make(changes={"share": 0.1})
    fleet.to_stage("uploading")
    assert {len(upload) for upload in fleet.uploads.values()} == {2 * fleet.layout.word_count}
    assert fleet.layout.word_count == 1 + 24  # three blocks of 8 for 20 drawn and the head's 4


def test_what_was_learned_beside_the_drawn_weights_is_not_dropped_without_a_word(make: Make) -> None:
    fleet = make(changes={"share": 0.1}, strays=True)
    fleet.to_stage("training")
    fleet.hear()
    fleet.train("box-1")
    assert is_out(fleet)
    assert "body.weight moved where the round does not move it" in the_no(fleet).reason


def test_a_share_of_adapters_is_declined(make: Make) -> None:
    fleet = make(changes={"share": 0.1, "trainable": "adapters"})
    fleet.tell("box-1", fleet.plan)
    assert is_out(fleet)
    assert "a share of 0.1 of adapters" in the_no(fleet).reason


def test_more_examples_weigh_more_up_to_the_cap(make: Make) -> None:
    for cap, level in ((2, 255), (3, 255), (10, 76)):
        plan = make_plan("a" * 64, b"k" * 32, kind="masked", examples_cap=cap)
        made = update.to_words({"head": np.ones(4, np.float32)}, plan, 3)
        assert made.words[0] == level


def test_answer_and_keys_go_out_together(make: Make) -> None:
    fleet = make()
    fleet.tell("box-1", fleet.plan)
    answer, keys = fleet.said("box-1")
    assert isinstance(answer, RoundAnswer)
    assert (answer.joins, answer.examples) == (True, 3)
    assert isinstance(keys, RoundKeys)


def test_secrets_of_a_round_that_ended_while_somebody_read_are_forgotten_later(make: Make) -> None:
    fleet = make()
    fleet.to_stage("shared")
    box = fleet.boxes["box-1"]
    secrets, reader = secrets_of(fleet), database.connect(box.data_dir)
    reader.execute("BEGIN")
    assert reader.execute("SELECT * FROM masked_parts").fetchall()
    fleet.close_round()
    assert on_disk(fleet, secrets) == [True] * 3
    assert database.has_to_forget(box.db)
    reader.execute("COMMIT")
    assert database.forget_on_disk(box.db)
    assert on_disk(fleet, secrets) == [False] * 3
    reader.close()


def test_whoever_drops_out_after_the_shares_is_taken_off_the_sum(make: Make) -> None:
    fleet = make()
    fleet.to_stage("training")
    fleet.collect(away=["box-5"])
    fleet.tell_survivors()
    assert fleet.told.dropped == ("box-5",)
    fleet.agree()
    assert {fleet.state(name) for name in NAMES[:4]} == {State.UNMASKED}
    (unmask,) = [message for message in fleet.said("box-1") if isinstance(message, Unmask)]
    assert (sorted(unmask.self_shares), sorted(unmask.mask_shares)) == (["box-2", "box-3", "box-4"], ["box-5"])
    assert (fleet.sum() == fleet.plain_sum()).all()


# --- twice, late, out of place --------------------------------------------------------------------


def test_a_stage_asked_for_again_is_said_again_the_same(make: Make) -> None:
    fleet = make()
    fleet.to_stage("keyed")
    fleet.form()
    first = fleet.said("box-1")
    fleet.tell("box-1", fleet.cohort("box-1"))
    assert fleet.said("box-1") == first
    fleet.hear()
    fleet.tell("box-1", fleet.cohort("box-1"))
    assert fleet.said("box-1") == first == [fleet.made["box-1"]]


def test_every_stage_is_answered_again_in_every_later_state(make: Make) -> None:
    """A hub restored from an hour before asks anew; it gets what it got then, and no second update."""
    fleet = make()
    fleet.to_stage("unmasked")
    fleet.hear()
    for message, answer in (
        (fleet.cohort("box-1"), fleet.made["box-1"]),
        (fleet.forwarded("box-1"), None),
        (fleet.told, fleet.signed["box-1"]),
        (fleet.agreement("box-1"), fleet.given["box-1"]),
    ):
        fleet.tell("box-1", message)
        assert fleet.state() == State.UNMASKED
        assert fleet.said("box-1") == ([answer] if answer else [])
        fleet.hear()


@pytest.mark.parametrize("stage", STAGES)
def test_a_plan_that_comes_again_gets_yes_and_the_same_keys(make: Make, stage: str) -> None:
    fleet = make()
    fleet.to_stage(stage)
    fleet.hear()
    before = secrets_of(fleet)
    fleet.tell("box-1", fleet.plan)
    answer, keys = fleet.said("box-1")
    assert isinstance(answer, RoundAnswer)
    assert answer.joins
    assert keys == fleet.keys["box-1"]
    assert secrets_of(fleet) == before


@pytest.mark.parametrize("stage", ["delivered", "agreed", "unmasked"])
def test_a_hub_that_forgot_the_update_gets_the_same_one_again(make: Make, stage: str) -> None:
    fleet = make()
    fleet.to_stage(stage)
    fleet.hear()
    upload = fleet.uploads["box-1"]
    fleet.tell("box-1", fleet.plan)
    assert fleet.state() == State.UPLOADING
    fleet.take_upload("box-1")
    assert fleet.uploads["box-1"] == upload
    fleet.tell("box-1", fleet.receipt("box-1"))
    if stage == "delivered":
        fleet.tell_survivors()
    fleet.tell("box-1", fleet.told)
    assert fleet.state() == State.AGREED
    fleet.hear()
    fleet.agree()
    assert (fleet.sum() == fleet.plain_sum()).all()


def test_the_lists_are_the_receipt_where_that_was_lost(make: Make) -> None:
    fleet = make()
    fleet.to_stage("training")
    fleet.collect(receipts=False)
    fleet.tell_survivors()
    assert fleet.states() == {State.AGREED}
    assert fleet.boxes["box-1"].rows("transfers_out") == []
    assert replay.learned_up_to(fleet.boxes["box-1"].db) == {"XR": 3}


def test_a_message_of_a_round_that_is_not_on_here_changes_nothing(make: Make) -> None:
    fleet = make()
    fleet.to_stage("unmasked")
    late = [fleet.cohort("box-1"), fleet.forwarded("box-1"), fleet.told, fleet.agreement("box-1")]
    fleet.close_round()
    for message in late:
        fleet.tell("box-1", message)
        fleet.tell("box-1", changed(message, round_id="never"))
    assert fleet.state() == State.CLOSED
    assert fleet.said("box-1") == []


def test_shares_that_came_again_while_training_change_nothing(make: Make) -> None:
    fleet = make()
    fleet.to_stage("training")
    before = fleet.boxes["box-1"].rows("masked_parts")
    fleet.tell("box-1", fleet.forwarded("box-1"))
    fleet.tell("box-1", fleet.cohort("box-1"))
    assert fleet.boxes["box-1"].rows("masked_parts") == before
    fleet.collect()
    assert fleet.state() == State.DELIVERED


# --- killed ---------------------------------------------------------------------------------------


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("stage", ["keyed", "shared", "agreed", "unmasked"])
def test_a_step_and_its_message_are_stored_together_or_not_at_all(
    make: Make, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    fleet = make()
    step: dict[str, tuple[str, Callable[[], messages.AnyMessage]]] = {
        "keyed": ("", lambda: fleet.plan),
        "shared": ("keyed", lambda: fleet.cohort("box-1")),
        "agreed": ("delivered", lambda: fleet.told),
        "unmasked": ("agreed", lambda: fleet.agreement("box-1")),
    }
    before, message = step[stage]
    enqueue = ledger.enqueue

    def cut(db: object, said: messages.AnyMessage, now: float) -> None:
        if cutting and not isinstance(said, RoundAnswer):
            raise PowerCutError
        enqueue(db, said, now)  # type: ignore[arg-type]

    cutting = False
    monkeypatch.setattr(ledger, "enqueue", cut)
    if before:
        fleet.to_stage(before)
    box, name = fleet.boxes["box-1"], "box-1"
    to_next = {"shared": fleet.form, "agreed": fleet.tell_survivors, "unmasked": fleet.agree}
    kept = box.rows("masked_parts")
    cutting = True
    with pytest.raises(PowerCutError):
        to_next.get(stage, lambda: fleet.tell(name, message()))()
    assert fleet.state() in (before, State.INVITED)
    assert box.rows("masked_parts") == kept
    cutting = False
    fleet.restarts = True
    if stage == "keyed":
        fleet.invite()
    for other in NAMES if stage != "keyed" else ():
        fleet.tell(other, fleet.cohort(other) if stage == "shared" else fleet.told)
        if stage == "unmasked":
            fleet.tell(other, fleet.agreement(other))
    assert fleet.states() == {stage}


def test_killed_between_the_sealed_file_and_its_row_the_box_trains_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the first update has left the box: the second is the one of this round."""
    fleet = make(restarts=True)
    fleet.to_stage("training")

    def cut(*_: object) -> messages.TransferOffer:
        raise PowerCutError

    with monkeypatch.context() as power:
        power.setattr(ledger, "offer_of", cut)
        with pytest.raises(PowerCutError):
            fleet.train("box-1")
    first = fleet.newest[0]
    assert [path.name for path in (fleet.boxes["box-1"].data_dir / "updates").iterdir()] == [f"{ROUND}.sealed"]
    assert fleet.state() == State.TRAINING
    fleet.collect()
    assert (fleet.words["box-1"] != first).any()
    fleet.tell_survivors()
    fleet.agree()
    assert (fleet.sum() == fleet.plain_sum()).all()


def test_a_round_closed_while_its_update_was_sealed_stays_closed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make()
    fleet.to_stage("training")
    written = ledger.offer_of

    def closed_meanwhile(*arguments: object) -> messages.TransferOffer:
        fleet.close_round("dropped", "too few")
        return written(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "offer_of", closed_meanwhile)
    fleet.train("box-1")
    assert fleet.state() == State.CLOSED
    assert fleet.boxes["box-1"].rows("masked_parts") == []
    assert fleet.boxes["box-1"].rows("transfers_out") == []
    assert list((fleet.boxes["box-1"].data_dir / "updates").glob("*")) == []


# --- what ends a round here -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("heard", [False, True])
def test_the_hub_may_close_the_round_at_any_stage(make: Make, stage: str, heard: bool) -> None:
    fleet = make()
    fleet.to_stage(stage)
    secrets = secrets_of(fleet)
    if heard:
        fleet.hear()
    fleet.close_round("dropped", "left out: no shares")
    box = fleet.boxes["box-1"]
    assert (fleet.state(), box.rows("rounds")[0]["reason"]) == (State.CLOSED, "left out: no shares")
    assert not [kind for kind in kinds(fleet) if kind != "RoundAnswer"]
    assert box.rows("masked_parts") == []
    assert on_disk(fleet, secrets) == [False] * 3
    assert replay.learned_up_to(box.db) == {}


def test_a_lost_update_is_not_made_a_second_time(make: Make) -> None:
    fleet = make()
    fleet.to_stage("uploading")
    fleet.hear()
    box = fleet.boxes["box-1"]
    box.db.execute("UPDATE transfers_out SET path = 'updates/gone.sealed'")
    Transfers(box.db, box.data_dir, lambda _: None, lambda _: True).load_outgoing(0.0)
    assert is_out(fleet)
    assert "lost from the disk; a masked round has no second one" in the_no(fleet).reason
    fleet.train("box-1")
    assert fleet.state() == State.DECLINED


def test_another_certificate_ends_an_upload(make: Make) -> None:
    fleet = make()
    fleet.to_stage("uploading")
    fleet.hear()
    box = fleet.boxes["box-1"]
    hub_change.follow(box.db, box.data_dir, box.enrolled, 0.0)
    assert fleet.state() == State.UPLOADING
    database.keep(box.db, hub_change.CERTIFICATE, 4711)
    hub_change.follow(box.db, box.data_dir, box.enrolled, 0.0)
    assert is_out(fleet)
    assert "sealed with the certificate before" in the_no(fleet).reason


def test_a_delivered_update_that_is_gone_cannot_be_asked_for_again(make: Make) -> None:
    fleet = make()
    fleet.to_stage("agreed")
    fleet.hear()
    box = fleet.boxes["box-1"]
    (box.data_dir / box.rows("rounds")[0]["update_path"]).unlink()
    fleet.tell("box-1", fleet.plan)
    assert is_out(fleet)
    assert "does not have it any more" in the_no(fleet).reason


@pytest.mark.parametrize("stage", STAGES)
def test_the_clock_ends_every_stage(make: Make, stage: str) -> None:
    """A ready update outlives the deadline by GIVE_UP_AFTER_S."""
    fleet = make()
    fleet.to_stage(stage)
    box, deadline = fleet.boxes["box-1"], fleet.plan.deadline_unix_s
    invitations.close_expired(box.db, box.data_dir, deadline)
    assert fleet.state() == (stage if stage in WITH_UPDATE else State.CLOSED)
    invitations.close_expired(box.db, box.data_dir, deadline + GIVE_UP_AFTER_S)
    assert fleet.state() == State.CLOSED
    assert box.rows("masked_parts") == []


def test_weights_that_cannot_be_added_up_are_declined(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make()
    fleet.to_stage("training")
    fleet.hear()
    broken = {name: np.full(2, np.nan, np.float32) for name in ("head.weight", "head.bias")}
    monkeypatch.setattr(learn, "train", lambda *_: learn.Trained(broken, learn.Report(3, 0, 0, 0, 0.1, 1)))
    fleet.train("box-1")
    assert is_out(fleet)
    assert "cannot be sent" in the_no(fleet).reason


def test_a_key_of_a_neighbour_that_is_none_ends_the_round_here(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """TrustError in the learner: the key of a pair mask is a point that gives every box the same secret."""
    fleet = make()
    fleet.to_stage("training")
    fleet.hear()
    box = fleet.boxes["box-1"]
    part = ledger.part_of(box.db, ROUND)
    assert part is not None
    bad = {name: changed(keys, mask_key=bytes(32)) for name, keys in part.neighbours.items()}
    box.db.execute("UPDATE masked_parts SET part = ?", (masking.encode(changed(part, neighbours=bad)),))
    fleet.train("box-1")
    assert is_out(fleet)
    assert "is no X25519 key" in the_no(fleet).reason
