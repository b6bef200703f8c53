"""Which examples take part in a round, and which update is sent at all."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from edge_agent import decode, hub_change, instances, invitations, learn, ledger, replay
from edge_agent.learn import Example
from edge_agent.learner import Learner
from edge_agent.rounds import Event, State
from fleet_link import sealing
from models.bundle import SHIPPED, read_bundle
from tests.edge_agent.link_support import Box, make_box, make_plan
from tests.fleet_link.mosquitto_support import TestAuthority


class Never:
    def is_set(self) -> bool:
        return False


@pytest.fixture(scope="module")
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture
def box(tmp_path: Path, authority: TestAuthority) -> Iterator[Box]:
    made = make_box(tmp_path, authority, learning={"replay_max": 2})
    yield made
    made.db.close()


# --- the draw -------------------------------------------------------------------------------------


def reviewed(first: int, **counts: int) -> list[Example]:
    """`XR_nodule=3` gives three such examples; verdicts are numbered from `first`."""
    kinds = [name.split("_") for name, count in counts.items() for _ in range(count)]
    return [Example(first + n, first + n, modality, label, "train") for n, (modality, label) in enumerate(kinds)]


def up_to(review_no: int) -> dict[str, int]:
    return dict.fromkeys(("XR", "CT", "MR"), review_no)


def kinds(examples: Sequence[Example]) -> Counter[tuple[str, str]]:
    return Counter((example.modality, example.label) for example in examples)


def test_fewer_than_the_bound_all_take_part_in_their_order() -> None:
    examples = reviewed(1, XR_normal=30, XR_nodule=2, CT_normal=1)
    assert replay.choose(examples, up_to(33), 33, seed=1) == examples
    assert replay.choose(examples, up_to(0), 0, seed=1) == examples


def test_new_ones_always_take_part_however_many() -> None:
    older, new = reviewed(1, XR_normal=50), reviewed(51, XR_normal=40)
    chosen = replay.choose(older + new, up_to(50), 10, seed=1)
    assert chosen[10:] == new
    assert set(chosen[:10]) < set(older)
    assert replay.choose(older + new, up_to(50), 0, seed=1) == new


def test_a_verdict_that_was_corrected_is_new_again() -> None:
    corrected = Example(3, 99, "XR", "nodule", "train")
    assert replay.choose([*reviewed(1, XR_normal=2), corrected], up_to(50), 0, seed=1) == [corrected]


def test_older_ones_are_drawn_evenly_over_modalities_and_labels() -> None:
    older = reviewed(1, XR_normal=400, XR_nodule=50, CT_normal=200, CT_bleed=5)
    drawn = kinds(replay.choose(older, up_to(655), 95, seed=1))
    assert drawn == {("XR", "normal"): 30, ("XR", "nodule"): 30, ("CT", "normal"): 30, ("CT", "bleed"): 5}


def test_what_is_left_over_goes_to_no_group_twice() -> None:
    older = reviewed(1, XR_normal=9, XR_nodule=9, CT_normal=9)
    assert sorted(kinds(replay.choose(older, up_to(27), 8, seed=1)).values()) == [2, 3, 3]


def test_the_seed_decides_the_draw() -> None:
    older = reviewed(1, XR_normal=100, XR_nodule=100)
    assert replay.choose(older, up_to(200), 20, seed=7) == replay.choose(older, up_to(200), 20, seed=7)
    assert replay.choose(older, up_to(200), 20, seed=7) != replay.choose(older, up_to(200), 20, seed=8)


# --- the rounds before ----------------------------------------------------------------------------


def seal(box: Box, round_id: str, newest_verdict: int) -> None:
    ledger.invite(box.db, make_plan("b" * 64, b"k" * 1216, round_id=round_id), 0.0)
    ledger.apply(box.db, box.data_dir, round_id, Event.ADMITTED, 0.0)
    replay.keep_learned(box.db, round_id, [Example(1, newest_verdict, "XR", "normal", "train")])
    sealed = ledger.Outcome(reason=replay.NOT_COUNTED, update_path=f"updates/{round_id}.sealed")
    ledger.apply(box.db, box.data_dir, round_id, Event.SEALED, 0.0, sealed)


def deliver(box: Box, round_id: str) -> None:
    """As transfers.on_receipt."""
    ledger.apply(box.db, box.data_dir, round_id, Event.ACCEPTED, 0.0, ledger.Outcome(reason=""))


def close(box: Box, round_id: str, reason: str = "") -> None:
    """As link.py on the hub's RoundClosed: a released round has no reason, a dropped one has."""
    ledger.apply(box.db, box.data_dir, round_id, Event.CLOSED_BY_HUB, 0.0, ledger.Outcome(reason=reason or None))


def test_an_update_counts_from_the_hubs_receipt_on(box: Box) -> None:
    assert replay.learned_up_to(box.db) == {}
    seal(box, "round-1", 40)
    assert replay.learned_up_to(box.db) == {}
    deliver(box, "round-1")
    assert replay.learned_up_to(box.db) == {"XR": 40}
    close(box, "round-1")
    assert replay.learned_up_to(box.db) == {"XR": 40}


def test_to_another_hub_every_verdict_is_new(box: Box) -> None:
    hub_change.follow(box.db, box.data_dir, box.enrolled, 0.0)
    seal(box, "round-1", 40)
    deliver(box, "round-1")
    box.enrolled.folder.ca.write_bytes(TestAuthority("elsewhere").pem)
    hub_change.follow(box.db, box.data_dir, box.enrolled, 0.0)
    assert replay.learned_up_to(box.db) == {}


def test_what_no_update_was_trained_on_is_new_whatever_else_was_learned(box: Box) -> None:
    """The site takes part with CT from now on, whose verdicts are older than the newest X-ray's."""
    seal(box, "round-1", 40)
    deliver(box, "round-1")
    examples = reviewed(1, XR_normal=5, CT_normal=5)
    assert replay.choose(examples, replay.learned_up_to(box.db), 0, seed=1) == examples[5:]


def test_an_update_that_a_restored_hub_asks_for_again_counts_when_it_has_it(box: Box) -> None:
    seal(box, "round-1", 40)
    update = box.data_dir / "updates" / "round-1.sealed"
    update.parent.mkdir(exist_ok=True)
    update.write_bytes(b"sealed")
    deliver(box, "round-1")
    known = ledger.find(box.db, "round-1")
    assert known is not None
    invitations.take(box.db, box.config, box.enrolled.identity, known.plan, 0.0)
    assert box.state_of("round-1") == State.UPLOADING
    close(box, "round-1")
    assert replay.learned_up_to(box.db) == {}


def test_what_a_dropped_round_learned_is_new_again(box: Box) -> None:
    seal(box, "round-1", 40)
    deliver(box, "round-1")
    close(box, "round-1", "too few devices delivered")
    assert replay.learned_up_to(box.db) == {}


def test_what_came_too_late_for_a_released_round_is_new_still(box: Box) -> None:
    seal(box, "round-1", 40)
    close(box, "round-1")
    assert box.state_of("round-1") == State.CLOSED
    assert replay.learned_up_to(box.db) == {}
    assert box.rows("rounds")[0]["reason"] == replay.NOT_COUNTED


def test_the_newest_counted_round_decides(box: Box) -> None:
    for number, newest in enumerate((70, 60, 65)):
        seal(box, f"round-{number}", newest)
        deliver(box, f"round-{number}")
    assert replay.learned_up_to(box.db) == {"XR": 70}


# --- the learner, with a stand-in for the child ---------------------------------------------------


Listed = list[dict[str, str]]


def stand_in(
    monkeypatch: pytest.MonkeyPatch, box: Box, *, before: int, after: int, heldout: int | None = None
) -> list[Listed]:
    """In place of the training child: writes the base's weights plus one and this report. Gives what it was shown."""
    shown: list[Listed] = []

    def stand_in_child(command: Sequence[str], folder: Path, timeout_s: float, stopped: Callable[[], bool]) -> None:
        listed = json.loads((folder / "examples.json").read_bytes())
        shown.append(listed)
        held = sum(row["split"] == "heldout" for row in listed) if heldout is None else heldout
        (folder / "out").mkdir()
        weights = read_bundle(box.shipped).weights
        save_file({name: value + 1 for name, value in weights.items()}, folder / "out" / "weights.safetensors")
        report = {"examples": len(listed) - held, "heldout": held, "seconds": 1.0, "peak_rss_bytes": 1}
        report |= {"heldout_correct_before": before, "heldout_correct_after": after}
        (folder / "out" / "report.json").write_text(json.dumps(report))

    monkeypatch.setattr(learn, "run_child", stand_in_child)
    return shown


def join(box: Box, round_id: str, **changes: object) -> None:
    """Run the learner on a new round."""
    key = sealing.public_bytes(sealing.new_sealing_key(box.data_dir / f"{round_id}.key"))
    ledger.invite(box.db, make_plan(box.holder.current.digest, key, round_id=round_id, **changes), 0.0)
    ledger.apply(box.db, box.data_dir, round_id, Event.ADMITTED, 0.0, ledger.Outcome(examples=2))
    Learner(box.config, box.holder, box.enrolled, time.time).step(box.db, Never())  # type: ignore[arg-type]


def review_many(box: Box, name: str, count: int) -> None:
    for number in range(count):
        box.add_reviewed(f"{name}{number}", bright=number % 2 == 0, label="nodule" if number % 2 == 0 else "normal")


def test_a_worse_candidate_is_not_sent_and_the_hub_is_told(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, box, before=5, after=3, heldout=6)
    review_many(box, "p", 8)
    join(box, "round-1")
    assert box.state_of("round-1") == State.DECLINED
    assert box.rows("transfers_out") == []
    assert not (box.data_dir / "updates").exists()
    assert not (box.data_dir / "learning" / "round-1").exists()
    (answer,) = ledger.pending(box.db)
    assert answer.joins is False  # type: ignore[union-attr]
    assert answer.reason == "not sent, clearly worse on this site's held-out reviews: 5 of 6 right before, 3 after"  # type: ignore[union-attr]
    assert replay.learned_up_to(box.db) == {}


@pytest.mark.parametrize("after", [4, 5, 6])
def test_a_candidate_that_is_not_clearly_worse_is_sent(box: Box, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    stand_in(monkeypatch, box, before=5, after=after, heldout=6)
    review_many(box, "p", 8)
    join(box, "round-1")
    assert box.state_of("round-1") == State.UPLOADING
    assert len(box.rows("transfers_out")) == 1
    assert box.rows("rounds")[0]["reason"] == replay.NOT_COUNTED


def test_without_heldout_reviews_nothing_is_judged_and_the_log_says_so(
    box: Box, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stand_in(monkeypatch, box, before=0, after=0, heldout=0)
    review_many(box, "p", 8)
    join(box, "round-1")
    assert box.state_of("round-1") == State.UPLOADING
    assert "there is none to judge by" in caplog.text


def test_a_later_round_learns_what_is_new_and_a_bounded_share_of_the_rest(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """replay_max is 2 here; a round that was not counted makes nothing old."""
    monkeypatch.setattr(learn, "split_of", lambda patient, heldout_fraction: "train")
    shown = stand_in(monkeypatch, box, before=0, after=0)
    review_many(box, "p", 8)
    join(box, "round-1")
    close(box, "round-1")
    join(box, "round-2")
    deliver(box, "round-2")
    close(box, "round-2")
    review_many(box, "q", 3)
    join(box, "round-3")
    first, second, third = shown
    assert (len(first), len(second), len(third)) == (8, 8, 5)
    new = {Path(row["path"]).name for row in box.rows("examples") if row["series_no"] > 8}
    assert new < {row["path"] for row in third}
    assert {row["label"] for row in third if row["path"] not in new} == {"nodule", "normal"}
    assert ledger.find(box.db, "round-3").examples == 5  # type: ignore[union-attr]


def test_a_round_never_gets_too_few_because_of_the_bound(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "split_of", lambda patient, heldout_fraction: "train")
    shown = stand_in(monkeypatch, box, before=0, after=0)
    review_many(box, "p", 8)
    join(box, "round-1")
    deliver(box, "round-1")
    review_many(box, "q", 1)
    join(box, "round-2", min_examples=6)
    assert box.state_of("round-2") == State.UPLOADING
    assert len(shown[1]) == 6


def test_the_newest_heldout_reviews_judge(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.learner.MAX_HELDOUT", 3)
    monkeypatch.setattr(learn, "split_of", lambda patient, heldout_fraction: "heldout" if "h" in patient else "train")
    shown = stand_in(monkeypatch, box, before=0, after=0)
    review_many(box, "h", 5)
    review_many(box, "p", 2)
    join(box, "round-1")
    newest = {Path(row["path"]).name for row in box.rows("examples") if row["series_no"] in (3, 4, 5)}
    assert {row["path"] for row in shown[0] if row["split"] == "heldout"} == newest


@pytest.mark.slow
def test_the_real_child_that_unlearns_is_not_sent(
    tmp_path: Path, authority: TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out verdicts are what the shipped network says; those it learns from say the opposite."""
    monkeypatch.setattr(learn, "split_of", lambda patient, heldout_fraction: "heldout" if "h" in patient else "train")
    box = make_box(tmp_path, authority, inference={"bundle": str(SHIPPED)})
    reader = box.holder.current.reader
    for number in range(8):
        series_no = box.add_reviewed(f"{'h' if number < 4 else 'p'}{number}", bright=True, label="normal")
        said = reader.read(decode.to_volume(instances.open(box.db, box.data_dir, series_no)).volume).predicted
        box.review(series_no, said if number < 4 else "nodule" if said == "normal" else "normal")
    join(box, "round-1", epochs=8, learning_rate=5e-3)
    assert box.state_of("round-1") == State.DECLINED
    assert box.rows("rounds")[0]["reason"].startswith("not sent, clearly worse on this site's held-out reviews: 4 of 4")
    assert box.rows("transfers_out") == []
