"""Rounds on disk: the whole way, every refusal, and kill -9 between any two steps."""

import math
import re
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import delete

from cloud_hub import ledger, registry
from cloud_hub.collection import Collection
from cloud_hub.coordinator import Coordinator
from cloud_hub.database import Refusal, Release, Round, RoundDevice
from cloud_hub.rollout import Stage
from cloud_hub.update import Update
from fleet_link import sealing
from fleet_link.errors import SiteError
from fleet_link.messages import RoundAnswer, RoundPlan
from models import delta
from tests.cloud_hub.round_support import (
    RoundHub,
    change_of,
    failing_export,
    make_round_hub,
    needs_bundle,
    shapes,
)

pytestmark = [needs_bundle, pytest.mark.slow]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RoundHub]:
    hub = make_round_hub(tmp_path, "a", "b", "c")
    yield hub
    hub.coordinator.stop()
    hub.files.database.close()


def refusals(hub: RoundHub) -> list[tuple[str, str, str]]:
    with hub.files.database.reading() as session:
        return [(row.device, row.what, row.reason) for row in session.query(Refusal)]


def test_round_from_invitation_to_release(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b")
    hub.join("c", joins=False, reason="too few cases")
    assert hub.deliver("a", hub.boxes["a"].seal(plan, 0.02, examples=10)) == ""
    assert hub.round().state == "uploading"
    assert hub.deliver("b", hub.boxes["b"].seal(plan, 0.06, examples=30)) == ""
    assert hub.round().state == "summed"
    row = hub.tick_until("released")
    release = hub.release(2)
    assert release is not None
    assert (release.bundle_digest, release.round_id, release.state) == (
        row.candidate_digest,
        hub.round_id,
        Stage.CANARY,
    )
    change = change_of(hub, release.bundle_digest)
    for name in change:
        expected = (10 * 0.02 + 30 * 0.06) / 40 if name.startswith("head.") else 0.0
        assert np.allclose(change[name], expected, atol=1e-6), name
    assert hub.member("c").reason == "too few cases"
    assert hub.member("a").bytes_received > 0
    hub.coordinator.tick(hub.now)
    assert list(hub.files.config.paths.rounds.iterdir()) == []  # nobody's update stays


def test_tick_tells_when_a_round_began_and_ended(hub: RoundHub) -> None:
    assert hub.coordinator.tick(hub.now) is False
    hub.start(min_devices=3)
    assert [hub.coordinator.tick(hub.now) for _ in range(2)] == [True, False]
    hub.join("a", joins=False, reason="no")
    assert hub.round().state == "dropped"
    assert [hub.coordinator.tick(hub.now) for _ in range(2)] == [True, False]


def test_a_round_is_looked_at_again_after_a_pause_or_where_the_clock_went_back(
    hub: RoundHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[float] = []
    apply = hub.intake.apply
    monkeypatch.setattr(hub.intake, "apply", lambda *what: (looked.append(what[-1] - hub.now), apply(*what)))
    config = hub.files.config
    coordinator = Coordinator(config, hub.files.database, hub.repository, hub.intake, look_s=1.0)
    hub.start()
    for after_s in (0.0, 0.5, 1.0, 1.5, -60.0, 3601.0):
        coordinator.tick(hub.now + after_s)
    assert looked == pytest.approx([0.0, 1.0, -60.0, 3601.0])
    assert hub.round().state == "dropped"


# --- start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_devices": 4}, "3 devices are invited, 4 are needed"),
        ({"devices": ["a", "stranger"]}, "stranger is not an enrolled device"),
        ({"kind": "masked", "min_devices": 1, "devices": ["a", "b"]}, "2 devices are invited, 3 are needed"),
    ],
)
def test_round_that_cannot_end_well_is_not_started(hub: RoundHub, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(SiteError, match=reason) as refused:
        hub.start(**changes)
    assert refused.value.advice


def test_one_round_at_a_time(hub: RoundHub) -> None:
    hub.start()
    with pytest.raises(SiteError, match=rf"round {hub.round_id} is on \(invited\)"):
        hub.start()


def test_revoked_and_unenrolled_devices_are_not_invited(hub: RoundHub) -> None:
    hub.files.add_device("without-certificate")
    with hub.files.database.writing() as session:
        registry.revoke(session, "c", now=hub.now)
    with pytest.raises(SiteError, match="2 devices are invited, 3 are needed"):
        hub.start(min_devices=3)


def test_base_is_the_newest_release_for_everyone_however_long_another_is_on_trial(hub: RoundHub) -> None:
    first = hub.start()
    hub.join("a", "b", "c")
    for name in "abc":
        hub.deliver(name, hub.boxes[name].seal(first, 0.01))
    made = hub.tick_until("released").candidate_digest
    bases = []
    for stage in (Stage.CANARY, Stage.HALTED, Stage.EVERYONE):
        with hub.files.database.writing() as session:
            session.get_one(Release, 2).state = stage
        bases.append(hub.start().base_digest)
        with hub.files.database.writing() as session:
            ledger.drop(session, hub.round_id, "", hub.now)
    assert bases == [first.base_digest, first.base_digest, made]
    with hub.files.database.writing() as session:
        session.get_one(Release, 1).state = Stage.HALTED
        session.get_one(Release, 2).state = Stage.CANARY
    assert hub.start().base_digest == made  # the first one that is not halted


def test_round_has_another_name_after_the_hub_lost_the_first(hub: RoundHub) -> None:
    first = hub.start()
    with hub.files.database.writing() as session:
        session.execute(delete(RoundDevice))
        session.execute(delete(Round))  # as restored from a backup made before
    second = hub.start()
    assert re.fullmatch(r"r0001-[0-9a-f]{8}", first.round_id)
    assert second.round_id[:5] == "r0001"
    assert second.round_id != first.round_id


# --- drop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["invited", "uploading", "summed", "evaluated"])
def test_operator_drops_a_round_that_is_on_and_another_may_start(hub: RoundHub, state: str) -> None:
    plan = hub.start()
    hub.coordinator.tick(hub.now)
    if state != "invited":
        hub.join("a", "b", "c")
        for name in "a" if state == "uploading" else "abc":
            hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    hub.tick_until(state)
    with hub.files.database.writing() as session:
        ledger.drop(session, plan.round_id, "wrong rate", hub.now)
    assert hub.coordinator.tick(hub.now) is True  # boxes are to hear of it
    assert (hub.round().state, hub.round().reason) == ("dropped", "dropped by the operator: wrong rate")
    assert list(hub.files.config.paths.rounds.iterdir()) == []
    assert hub.release(2) is None
    assert hub.start().round_id != plan.round_id


def test_round_dropped_at_the_moment_of_its_publication_makes_no_release(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    for name in "abc":
        hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    hub.tick_until("evaluated")
    with hub.files.database.writing() as session:
        ledger.drop(session, plan.round_id, "", hub.now)
    hub.coordinator._publish(plan.round_id, hub.now)  # decided before the operator's word
    assert hub.release(2) is None
    assert len(list(hub.repository.listed())) == 1


def test_round_whose_release_a_restored_database_does_not_know_can_be_dropped(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    with hub.files.database.writing() as session:
        session.get_one(Release, 1).round_id = plan.round_id  # published after the backup: files are newer than rows
        ledger.drop(session, plan.round_id, "", hub.now)
    assert hub.round().state == "dropped"


def test_finished_or_unknown_round_is_not_dropped(hub: RoundHub) -> None:
    plan = hub.start(min_devices=3)
    hub.join("a", joins=False)
    with hub.files.database.writing() as session:
        with pytest.raises(SiteError, match="is over") as refused:
            ledger.drop(session, plan.round_id, "", hub.now)
        with pytest.raises(registry.NotFoundError):
            ledger.drop(session, "r0042", "", hub.now)
    assert refused.value.advice


def test_update_that_is_being_counted_when_its_round_is_dropped_is_told_so(
    hub: RoundHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    add = Collection.add

    def dropped_at_this_moment(collected: Collection, device: str, update: Update) -> None:
        add(collected, device, update)
        with hub.files.database.writing() as session:
            ledger.drop(session, plan.round_id, "", hub.now)

    monkeypatch.setattr(Collection, "add", dropped_at_this_moment)
    assert hub.deliver("a", hub.boxes["a"].seal(plan, 0.01)) == f"round {plan.round_id} is over"
    assert hub.member("a").counted_at is None


# --- answers --------------------------------------------------------------------------------------


def test_answers_that_are_refused(hub: RoundHub) -> None:
    hub.start(devices=["a", "b"])
    yes = RoundAnswer(message_id="0" * 32, round_id=hub.round_id, joins=True, examples=9)
    assert hub.intake.answered("c", yes, hub.now) == (False, f"c is not invited to a round {hub.round_id}")
    stranger = msgspec.structs.replace(yes, round_id="r0009")
    assert hub.intake.answered("a", stranger, hub.now) == (False, "a is not invited to a round r0009")
    hub.join("a", joins=False)
    assert hub.intake.answered("b", yes, hub.now) == (False, f"round {hub.round_id} is over")


def test_same_answer_twice_is_accepted_twice(hub: RoundHub) -> None:
    hub.start()
    hub.join("a", "a")
    assert (hub.member("a").state, hub.member("a").examples) == ("joined", 20)


def test_device_revoked_in_a_round_is_waited_for_no_longer(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    with hub.files.database.writing() as session:
        registry.revoke(session, "c", now=hub.now)
    hub.coordinator.tick(hub.now)
    assert (hub.member("c").state, hub.member("c").reason) == ("refused", "the device is revoked")
    for name in "ab":
        hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    assert hub.round().state == "summed"
    assert refusals(hub) == [("c", "update", f"{hub.round_id}: the device is revoked")]


@pytest.mark.parametrize("restarts", [False, True])
def test_update_of_a_device_that_is_revoked_before_the_sum_is_closed_is_not_in_it(
    hub: RoundHub, restarts: bool
) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    hub.deliver("a", hub.boxes["a"].seal(plan, 0.09))
    hub.deliver("b", hub.boxes["b"].seal(plan, 0.01))
    with hub.files.database.writing() as session:
        registry.revoke(session, "a", now=hub.now)
    if restarts:
        hub.restart()
    assert hub.deliver("c", hub.boxes["c"].seal(plan, 0.03)) == ""  # the last one: it closes the sum
    assert (hub.member("a").state, hub.member("a").counted_at) == ("refused", None)
    row = hub.tick_until("released")
    assert np.allclose(change_of(hub, str(row.candidate_digest))[sorted(shapes(plan))[0]], 0.02, atol=1e-6)


def test_deadline_does_not_close_the_sum_over_a_revoked_device(hub: RoundHub) -> None:
    plan = hub.start(deadline_s=100.0)
    hub.join("a", "b", "c")
    for name in "ab":
        hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    with hub.files.database.writing() as session:
        registry.revoke(session, "a", now=hub.now)
    hub.now += 101.0
    hub.coordinator.tick(hub.now)
    assert hub.round().reason == "1 of 3 invited devices delivered at the deadline; 2 are needed"


def test_device_revoked_while_its_update_is_counted_does_not_count(
    hub: RoundHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    add = Collection.add

    def revoked_at_this_moment(collected: Collection, device: str, update: Update) -> None:
        add(collected, device, update)
        with hub.files.database.writing() as session:
            registry.revoke(session, "a", now=hub.now)

    with monkeypatch.context() as patched:
        patched.setattr(Collection, "add", revoked_at_this_moment)
        assert hub.deliver("a", hub.boxes["a"].seal(plan, 0.09)) == "the device is revoked"
    for name in "bc":
        hub.deliver(name, hub.boxes[name].seal(plan, 0.02))
    row = hub.tick_until("released")
    assert np.allclose(change_of(hub, str(row.candidate_digest))[sorted(shapes(plan))[0]], 0.02, atol=1e-6)


# --- poisoned updates -----------------------------------------------------------------------------


def poisons(hub: RoundHub, plan: RoundPlan) -> dict[str, tuple[bytes, str]]:
    """What box b might send instead of an update, and why it is refused."""
    b = hub.boxes["b"]
    good = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes(plan).items()}
    first = sorted(good)[0]
    sound = b.seal(plan, 0.01)
    payload = delta.encode(good, seed=1)
    foreign_key = sealing.public_bytes(sealing.new_sealing_key(hub.folder / f"{secrets.token_hex(4)}.key"))
    return {
        "wrong shape": (b.seal_delta(plan, good | {first: np.zeros((3, 3), np.float32)}), "has shape"),
        "missing tensor": (b.seal_delta(plan, {n: v for n, v in good.items() if n != first}), "expected tensors"),
        "foreign tensor": (b.seal_delta(plan, good | {"evil": np.zeros(3, np.float32)}), "expected tensors"),
        "nan": (b.seal_payload(plan, with_scale(payload, float("nan"))), "header is not valid"),
        "infinity": (b.seal_payload(plan, with_scale(payload, float("inf"))), "is not finite"),
        "trailing": (b.seal_payload(plan, payload + b"x"), "bytes follow the last tensor"),
        "unclipped": (b.seal(plan, 50.0), "the plan's limit is 10"),
        "no examples": (b.seal(plan, 0.01, examples=0), "0 examples"),
        "flipped bit": (sound[:400] + bytes([sound[400] ^ 1]) + sound[401:], "."),
        "not sealed": (payload, "not a sealed update"),
        "of another box": (hub.boxes["a"].seal(plan, 0.01), "."),
        "of another round": (b.seal(msgspec.structs.replace(plan, round_id="r0077"), 0.01), "made for another plan"),
        "of another plan": (b.seal(msgspec.structs.replace(plan, epochs=9), 0.01), "made for another plan"),
        "other sealing key": (
            b.seal(msgspec.structs.replace(plan, sealing_key=foreign_key), 0.01),
            "made for another plan",
        ),
    }


def with_scale(payload: bytes, scale: float) -> bytes:
    """The encoded delta with another scale of the first tensor."""
    (length,) = struct.unpack_from("<I", payload, 4)
    header = msgspec.msgpack.decode(payload[8 : 8 + length])
    header[0][2] = scale
    encoded = msgspec.msgpack.encode(header)
    return payload[:4] + struct.pack("<I", len(encoded)) + encoded + payload[8 + length :]


KINDS = [
    "wrong shape",
    "missing tensor",
    "foreign tensor",
    "nan",
    "infinity",
    "trailing",
    "unclipped",
    "no examples",
    "flipped bit",
    "not sealed",
    "of another box",
    "of another round",
    "of another plan",
    "other sealing key",
]


@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_update_is_refused_and_the_others_are_counted(hub: RoundHub, kind: str) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    all_poisons = poisons(hub, plan)
    assert list(all_poisons) == KINDS
    blob, reason = all_poisons[kind]
    assert hub.deliver("a", hub.boxes["a"].seal(plan, 0.01)) == ""
    assert re.search(reason, hub.deliver("b", blob))
    assert hub.deliver("c", hub.boxes["c"].seal(plan, 0.03)) == ""
    assert hub.member("b").state == "refused"
    assert [(device, what) for device, what, _ in refusals(hub)] == [("b", "update")]
    row = hub.tick_until("released")
    change = change_of(hub, str(row.candidate_digest))
    assert np.allclose(change[sorted(shapes(plan))[0]], 0.02, atol=1e-6)


def test_large_update_is_refused_before_it_travels(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a")
    offer, _ = hub.offer("a", hub.boxes["a"].seal(plan, 0.01))
    huge = msgspec.structs.replace(offer, size=hub.intake.update_bytes_max(hub.round_id) + 1)
    action, reason = hub.intake.judge_update("a", huge, hub.now)
    assert (action, "at most" in reason) == ("refuse", True)


def test_update_counts_once_however_often_it_comes(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    blob = hub.boxes["a"].seal(plan, 0.01)
    assert [hub.deliver("a", blob) for _ in range(3)] == ["", "", ""]
    hub.deliver("b", hub.boxes["b"].seal(plan, 0.04))
    hub.join("c", joins=False)
    row = hub.tick_until("released")
    assert np.allclose(change_of(hub, str(row.candidate_digest))[sorted(shapes(plan))[0]], 0.025, atol=1e-6)


def test_examples_beyond_the_cap_weigh_nothing(hub: RoundHub) -> None:
    plan = hub.start()
    cap = hub.files.config.rounds.examples_cap
    hub.join("a", "b")
    hub.join("c", joins=False)
    hub.deliver("a", hub.boxes["a"].seal(plan, 0.02, examples=cap * 1000))
    hub.deliver("b", hub.boxes["b"].seal(plan, 0.06, examples=cap))
    row = hub.tick_until("released")
    assert np.allclose(change_of(hub, str(row.candidate_digest))[sorted(shapes(plan))[0]], 0.04, atol=1e-6)


def test_uninvited_declined_and_late_updates_are_refused(hub: RoundHub) -> None:
    plan = hub.start(devices=["a", "b"])
    blob = hub.boxes["c"].seal(plan, 0.01)
    assert hub.deliver("c", blob) == f"c is not invited to a round {hub.round_id}"
    assert hub.intake.judge_update("a", hub.offer("a", blob)[0], hub.now)[0] == "wait"  # its answer is on its way
    hub.join("a", joins=False, reason="no time")
    assert hub.deliver("a", blob) == "no time"
    assert hub.round().state == "dropped"
    assert hub.deliver("b", blob) == f"round {hub.round_id} is over"


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            'import sys; print(\'{"error": "torch and ONNX Runtime differ by 0.3"}\', file=sys.stderr); sys.exit(1)',
            "differ by 0.3",
        ),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("raise SystemExit(7)", "exit code 7"),
        ("print('{}')", "export gave no bundle"),
    ],
)
def test_failed_export_drops_the_round_with_its_reason(hub: RoundHub, code: str, reason: str) -> None:
    hub.export_command = failing_export(code)
    hub.restart()
    plan = hub.start()
    hub.join("a", "b", "c")
    for name in "abc":
        hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    row = hub.tick_until("dropped")
    assert reason in row.reason
    assert hub.release(2) is None


def test_export_that_hangs_is_ended_and_one_whose_clock_is_set_is_not(
    hub: RoundHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.export_command = failing_export("import time; time.sleep(600)")
    hub.restart()
    plan = hub.start(deadline_s=1e6)
    hub.join("a", "b", "c")
    for name in "abc":
        hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    hub.coordinator.tick(hub.now)
    hub.now += hub.files.config.rounds.export_timeout_s + 1
    hub.coordinator.tick(hub.now)
    assert hub.round().state == "summed"
    monkeypatch.setattr(hub.coordinator._export, "_seconds", lambda: math.inf)
    assert "export took longer" in hub.tick_until("dropped").reason


# --- kill -9 --------------------------------------------------------------------------------------


def test_killed_between_any_two_steps_the_round_ends_the_same(hub: RoundHub) -> None:
    plan = hub.start()
    hub.restart()
    hub.join("a", "b")
    hub.restart()
    hub.deliver("a", hub.boxes["a"].seal(plan, 0.01, examples=10))
    hub.restart()
    hub.join("c", joins=False)
    hub.deliver("b", hub.boxes["b"].seal(plan, 0.05, examples=30))
    hub.restart()
    assert hub.round().state == "summed"
    hub.coordinator.tick(hub.now)  # the export runs
    hub.coordinator.stop()
    hub.restart()
    row = hub.tick_until("evaluated")
    hub.restart()
    row = hub.tick_until("released")
    assert np.allclose(change_of(hub, str(row.candidate_digest))[sorted(shapes(plan))[0]], 0.04, atol=1e-6)
    hub.restart()
    assert list(hub.files.config.paths.rounds.iterdir()) == []


def test_killed_after_the_metadata_and_before_the_row(hub: RoundHub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    for name in "abc":
        hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    row = hub.tick_until("evaluated")
    candidate = hub.files.config.paths.rounds / hub.round_id / "candidate.bundle"
    hub.repository.publish(candidate, round_id=hub.round_id, now=hub.now)
    assert hub.release(2) is None
    hub.restart()  # the row follows the files
    release = hub.release(2)
    assert release is not None
    assert release.bundle_digest == row.candidate_digest
    hub.tick_until("released")
    assert hub.release(3) is None


def test_killed_between_file_and_row_the_update_is_not_counted_before_it_comes_again(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    blob = hub.boxes["a"].seal(plan, 0.01)
    folder = hub.files.config.paths.rounds / hub.round_id / "updates"
    folder.mkdir(parents=True)
    (folder / "a.sealed").write_bytes(blob)
    hub.restart()
    assert hub.member("a").state == "joined"
    assert [hub.deliver(name, hub.boxes[name].seal(plan, 0.02)) for name in "abc"] == ["", "", ""]
    row = hub.tick_until("released")
    assert np.allclose(change_of(hub, str(row.candidate_digest))[sorted(shapes(plan))[0]], 0.02, atol=1e-6)


def test_counted_update_lost_from_disk_drops_the_round_with_its_reason(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    hub.deliver("a", hub.boxes["a"].seal(plan, 0.01))
    (hub.files.config.paths.rounds / hub.round_id / "updates" / "a.sealed").write_bytes(b"rotten")
    hub.restart()
    assert hub.deliver("b", hub.boxes["b"].seal(plan, 0.01)) == f"round {hub.round_id} is over"
    assert "the counted update of a cannot be read again" in hub.round().reason
    assert hub.member("b").state == "joined"  # not its fault


def test_disk_in_trouble_for_a_moment_drops_no_round(hub: RoundHub) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    hub.deliver("a", hub.boxes["a"].seal(plan, 0.01))
    kept = hub.files.config.paths.rounds / hub.round_id / "updates" / "a.sealed"
    content = kept.read_bytes()
    kept.unlink()
    kept.mkdir()  # whatever opens it gets an OSError that is not "no such file"
    hub.restart()
    with pytest.raises(SiteError, match="cannot be read now"):
        hub.deliver("b", hub.boxes["b"].seal(plan, 0.01))
    kept.rmdir()
    kept.write_bytes(content)
    assert hub.deliver("b", hub.boxes["b"].seal(plan, 0.01)) == ""
    assert hub.round().state not in ("dropped",)


@pytest.mark.parametrize("summed", [False, True])
def test_base_lost_from_disk_drops_the_round_with_its_reason(hub: RoundHub, summed: bool) -> None:
    plan = hub.start()
    hub.join("a", "b", "c")
    names = "abc" if summed else ""
    for name in names:
        hub.deliver(name, hub.boxes[name].seal(plan, 0.01))
    hub.restart()
    (hub.files.config.paths.releases / f"{plan.base_digest}.bundle").unlink()
    if summed:
        hub.coordinator.tick(hub.now)
    else:
        assert hub.deliver("a", hub.boxes["a"].seal(plan, 0.01)) == f"round {plan.round_id} is over"
    assert (hub.round().state, hub.round().reason[:18]) == ("dropped", "the round's base: ")


def test_hub_away_over_the_deadline_still_takes_the_updates(hub: RoundHub) -> None:
    plan = hub.start(deadline_s=100.0)
    hub.join("a", "b", "c")
    hub.now += 1000.0
    hub.restart()
    hub.coordinator.tick(hub.now)
    assert hub.round().state == "training"
    for name in "abc":
        assert hub.deliver(name, hub.boxes[name].seal(plan, 0.01)) == ""
    assert hub.round().state == "summed"


def test_deadline_ends_the_waiting(hub: RoundHub) -> None:
    hub.start(deadline_s=100.0)
    hub.join("a")
    hub.now += 101.0
    hub.coordinator.tick(hub.now)
    assert hub.round().reason == "0 of 3 invited devices delivered at the deadline; 2 are needed"
