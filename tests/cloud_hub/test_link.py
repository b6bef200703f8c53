"""The hub's end of the link, over a real Mosquitto with mutual TLS: rounds, releases and everything it must refuse."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from cloud_hub import ledger, link, registry
from cloud_hub.database import Certificate, Device, DeviceRelease, Refusal, Round, Transfer
from cloud_hub.rollout import Stage
from cloud_hub.rounds import Answered, Event, Member
from fleet_link import envelope
from fleet_link.messages import Receipt, ReleaseOffer, RoundAnswer, RoundClosed, RoundPlan
from fleet_link.pki import Identity, load_identity, load_private_key, serial_hex
from fleet_link.topics import Channel, Direction, Topic
from models.bundle import SHIPPED, file_digest
from tests.cloud_hub.box_twin import BoxTwin, new_id
from tests.cloud_hub.hub_support import needs_mosquitto, pem
from tests.cloud_hub.link_support import LinkedHub
from tests.cloud_hub.round_support import Box, make_round_hub, needs_bundle

pytestmark = [needs_bundle, needs_mosquitto, pytest.mark.slow]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LinkedHub]:
    made = LinkedHub(make_round_hub(tmp_path, "a", "b"))
    for name in "ab":
        made.add(name)
    yield made
    made.close()


def device(hub: LinkedHub, name: str) -> Device:
    with hub.database.reading() as session:
        return session.get_one(Device, name)


def test_round_and_release_over_the_wire(hub: LinkedHub) -> None:
    a, b = hub.boxes["a"], hub.boxes["b"]
    for box in (a, b):
        box.heartbeat()
    hub.until(lambda: device(hub, "a").last_seen_at and device(hub, "b").last_seen_at)
    plan = hub.rounds.start()
    hub.until(lambda: a.of(RoundPlan) and b.of(RoundPlan))
    assert a.of(RoundPlan)[0] == plan
    for box in (a, b):
        box.answer(plan.round_id)
    hub.until(lambda: a.of(Receipt) and b.of(Receipt))
    transfers = {box: box.upload(plan.round_id, hub.rounds.boxes[box.name].seal(plan, 0.01)) for box in (a, b)}
    hub.until(lambda: all(box.verdicts(transfers[box]) for box in (a, b)))
    assert [box.verdicts(transfers[box]) for box in (a, b)] == [[(True, "")], [(True, "")]]
    for box in (a, b):
        box.heartbeat()
    hub.until(lambda: a.of(RoundClosed) and b.of(RoundClosed))
    assert a.of(RoundClosed)[0].outcome == "released"
    # The canary is offered it, fetches it, reports; only then everybody is.
    hub.until(lambda: a.of(ReleaseOffer))
    offer = a.of(ReleaseOffer)[0]
    a.request(offer.bundle_digest)
    hub.until(lambda: a.bundles)
    assert file_digest(a.bundles[0]) == offer.bundle_digest
    assert not b.of(ReleaseOffer)
    a.report(2, offer.bundle_digest, "activated", heldout=8)
    a.bundle_digest, a.release_version = offer.bundle_digest, 2
    a.heartbeat()
    hub.until(lambda: b.of(ReleaseOffer))
    with hub.database.reading() as session:
        row = session.get_one(DeviceRelease, ("a", 2))
        assert (row.outcome, row.heldout) == ("activated", 8)
        states = {(t.device, t.direction): t.state for t in session.query(Transfer)}
    assert states == {("a", "in"): "done", ("b", "in"): "done", ("a", "out"): "done"}


def test_canary_that_refuses_halts_the_release_where_the_operator_sees_it(hub: LinkedHub) -> None:
    a, b = hub.boxes["a"], hub.boxes["b"]
    plan = hub.rounds.start()
    hub.rounds.join("a", "b")
    for name in "ab":
        hub.rounds.deliver(name, hub.rounds.boxes[name].seal(plan, 0.01))
    for box in (a, b):
        box.heartbeat()
    hub.until(lambda: a.of(ReleaseOffer))
    a.report(2, a.of(ReleaseOffer)[0].bundle_digest, "refused", "clearly worse here")
    hub.until(lambda: getattr(hub.rounds.release(2), "state", "") == Stage.HALTED)
    assert hub.refusals("") == ["2: canary a refused: clearly worse here"]
    b.heartbeat()
    for _ in range(5):
        hub.step()
    assert not b.of(ReleaseOffer)


def test_plan_is_said_again_until_it_is_answered(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.heartbeat()
    plan = hub.rounds.start()
    hub.until(lambda: a.of(RoundPlan))
    hub.link._owed["a"] = 0.0  # resend_s later
    hub.until(lambda: len(a.of(RoundPlan)) == 2)
    a.answer(plan.round_id)
    hub.until(lambda: a.of(Receipt))
    hub.link._owed["a"] = 0.0
    a.heartbeat()
    for _ in range(5):
        hub.step()
    assert len(a.of(RoundPlan)) == 2


def test_what_the_bus_did_not_take_is_owed_at_once(hub: LinkedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    a = hub.boxes["a"]
    a.heartbeat()
    hub.until(lambda: device(hub, "a").heartbeat)
    with monkeypatch.context() as full:
        full.setattr(hub.bus, "publish_message", lambda topic, payload: False)
        hub.rounds.start()
        for _ in range(3):
            hub.step()
        assert not hub.link._owed["a"] > time.time()  # not put off by resend_s
    hub.until(lambda: a.of(RoundPlan))
    assert hub.link._owed["a"] > time.time()


def test_what_a_message_does_and_that_it_came_are_kept_together(
    hub: LinkedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = hub.boxes["a"]
    a.heartbeat()
    plan = hub.rounds.start()
    hub.until(lambda: a.of(RoundPlan))
    before, advance = device(hub, "a").last_sequence, hub.rounds.intake._advance
    with monkeypatch.context() as killed:

        def kill(session: Session, row: Round, event: Event, now: float) -> None:
            if isinstance(event, Answered):
                raise RuntimeError("killed before the commit")
            advance(session, row, event, now)

        killed.setattr(hub.rounds.intake, "_advance", kill)
        a.answer(plan.round_id)
        with pytest.raises(RuntimeError, match="killed"):
            hub.until(lambda: False)
    assert device(hub, "a").last_sequence == before
    assert hub.rounds.member("a").state == Member.INVITED
    assert not a.of(Receipt)
    a.answer(plan.round_id)
    hub.until(lambda: a.of(Receipt))
    assert device(hub, "a").last_sequence > before
    assert hub.rounds.member("a").state == Member.JOINED


def test_nothing_is_said_again_while_messages_wait(hub: LinkedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    a = hub.boxes["a"]
    a.heartbeat()
    hub.rounds.start()
    hub.until(lambda: a.of(RoundPlan))
    monkeypatch.setattr(link, "MAX_TAKEN", 0)  # as if more had come than get their turn
    hub.link._owed["a"] = time.time() - 1.0
    for _ in range(5):
        hub.step()
    assert len(a.of(RoundPlan)) == 1
    hub.link._owed["a"] = time.time() - link.PATIENCE_S
    hub.until(lambda: len(a.of(RoundPlan)) == 2)


def test_hub_restarted_in_mid_round_goes_on(hub: LinkedHub) -> None:
    a, b = hub.boxes["a"], hub.boxes["b"]
    a.heartbeat()
    plan = hub.rounds.start()
    hub.until(lambda: a.of(RoundPlan))
    hub.restart()
    b.heartbeat()
    hub.until(lambda: b.of(RoundPlan))
    for box in (a, b):
        box.answer(plan.round_id)
    hub.until(lambda: a.of(Receipt) and b.of(Receipt))
    transfer = a.upload(plan.round_id, hub.rounds.boxes["a"].seal(plan, 0.01))
    hub.until(lambda: a.verdicts(transfer))
    hub.restart()
    transfer = b.upload(plan.round_id, hub.rounds.boxes["b"].seal(plan, 0.01))
    hub.until(lambda: b.verdicts(transfer))
    hub.until(lambda: hub.rounds.round().state == "released")


def test_receipt_that_was_lost_is_given_again(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    plan = hub.rounds.start()
    hub.rounds.join("a", "b")
    blob = hub.rounds.boxes["a"].seal(plan, 0.01)
    for _ in range(2):
        transfer = a.upload(plan.round_id, blob)
        hub.until(lambda transfer=transfer: a.verdicts(transfer))
        assert a.verdicts(transfer) == [(True, "")]
    assert hub.rounds.member("a").state == "delivered"


def test_box_that_delivered_what_a_restored_hub_has_lost_is_told_the_plan_again(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    plan = hub.rounds.start()
    hub.rounds.join("a")
    a.round_state[plan.round_id] = "training"
    a.heartbeat()
    hub.until(lambda: device(hub, "a").heartbeat)
    for _ in range(5):
        hub.step()
    assert not a.of(RoundPlan)
    a.round_state[plan.round_id] = "delivered"
    a.heartbeat()
    hub.until(lambda: a.of(RoundPlan))


def test_round_that_the_operator_drops_is_closed_at_the_boxes(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    plan = hub.rounds.start()
    a.heartbeat()
    hub.until(lambda: a.of(RoundPlan))
    a.answer(plan.round_id)
    a.heartbeat()
    hub.until(lambda: "training" in str(device(hub, "a").heartbeat))
    with hub.database.writing() as session:
        ledger.drop(session, plan.round_id, "wrong rate", time.time())
    hub.until(lambda: a.of(RoundClosed))
    closed = a.of(RoundClosed)[0]
    assert (closed.round_id, closed.outcome, closed.reason) == (
        plan.round_id, "dropped", "dropped by the operator: wrong rate",
    )  # fmt: skip


def test_round_that_the_hub_does_not_know_is_closed(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.round_state["r0042"] = "uploading"
    a.heartbeat()
    hub.until(lambda: a.of(RoundClosed))
    assert (a.of(RoundClosed)[0].round_id, a.of(RoundClosed)[0].outcome) == ("r0042", "dropped")


# --- refusals -------------------------------------------------------------------------------------


def test_update_with_a_wrong_digest_or_content_is_refused_and_the_other_counted(hub: LinkedHub) -> None:
    a, b = hub.boxes["a"], hub.boxes["b"]
    plan = hub.rounds.start(min_devices=1)
    hub.rounds.join("a", "b")
    blob = hub.rounds.boxes["a"].seal(plan, 0.01)
    transfer = a.upload(plan.round_id, blob, sha256="0" * 64)
    hub.until(lambda: a.verdicts(transfer))
    assert a.verdicts(transfer)[0][0] is False
    assert "digest" in a.verdicts(transfer)[0][1].lower() or "sha" in a.verdicts(transfer)[0][1].lower()
    transfer = b.upload(plan.round_id, hub.rounds.boxes["b"].seal(plan, 0.01))
    hub.until(lambda: b.verdicts(transfer))
    assert b.verdicts(transfer) == [(True, "")]
    assert (hub.rounds.member("a").state, hub.rounds.member("b").state) == ("refused", "delivered")
    assert hub.refusals("a")
    hub.until(lambda: hub.rounds.round().state == "released")


def test_forged_message_is_refused(hub: LinkedHub) -> None:
    a, b = hub.boxes["a"], hub.boxes["b"]
    a.say(hello(a), identity=b.identity)
    hub.until(lambda: hub.refusals("a"))
    assert device(hub, "a").last_sequence == 0


def test_changed_message_is_refused(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    sealed = envelope.seal(a.identity, "hub", hello(a), sequence=5, now=time.time())
    a.send_raw(sealed.replace(b"r0001", b"r0002"))
    hub.until(lambda: hub.refusals("a"))
    assert "signature" in hub.refusals("a")[0]


def test_message_that_mqtt_repeats_is_dropped_without_a_refusal(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    hub.rounds.start()
    sealed = a.say(hello(a))
    hub.until(lambda: a.of(Receipt))
    a.send_raw(sealed)
    a.send_raw(b"garbage")  # after it: when this one is refused, the repeated one was looked at
    hub.until(lambda: hub.refusals("a"))
    assert [reason[:15] for reason in hub.refusals("a")] == ["not an envelope"]
    assert len(a.of(Receipt)) == 1


def test_replayed_sequence_is_refused_also_after_a_restart(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    hub.rounds.start()
    sealed = a.say(hello(a))
    hub.until(lambda: a.of(Receipt))
    sequence = device(hub, "a").last_sequence
    a.say(hello(a), sequence=sequence)  # other content under a number that was used
    hub.until(lambda: hub.refusals("a"))
    assert "was seen before" in hub.refusals("a")[0]
    hub.restart()
    a.send_raw(sealed)
    hub.until(lambda: count(hub, "a") == 2)
    assert len(a.of(Receipt)) == 1


def test_box_whose_clock_is_corrected_after_its_start_is_heard(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.heartbeat()
    hub.until(lambda: device(hub, "a").last_sequence)
    hub.restart()
    clock = [1000.0]
    a._sequence = envelope.Sequence(lambda: clock[0], 0, lambda highest: None)  # a replaced disk, 1970
    assert a._sequence.next() < device(hub, "a").last_sequence
    clock[0] = time.time()
    a.say(hello(a))
    hub.until(lambda: a.of(Receipt))
    assert hub.refusals("a") == []


def test_hub_goes_on_above_what_it_sent_with_its_clock_set_back(
    hub: LinkedHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = hub.boxes["a"]
    hub.rounds.start()
    a.say(hello(a))
    hub.until(lambda: a.of(Receipt))
    hub.clock_offset_s = -600.0
    hub.restart()
    a.say(hello(a))
    hub.until(lambda: len(a.of(Receipt)) == 2)
    assert a.sequences == sorted(set(a.sequences))


def test_box_is_told_again_though_the_clock_went_back(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.heartbeat()
    hub.rounds.start()
    hub.until(lambda: a.of(RoundPlan))
    hub.link._owed["a"] = time.time() + 86_400.0  # as written before the clock was set back by a day
    hub.until(lambda: len(a.of(RoundPlan)) == 2)


def test_replaced_certificate_counts_no_more_and_uses_up_no_sequence(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    hub.rounds.start()
    old = a.identity
    replace_certificate(hub, "a")
    a.say(hello(a), sequence=2**62)
    hub.until(lambda: hub.refusals("a"))
    assert "was revoked or replaced" in hub.refusals("a")[0]
    assert device(hub, "a").last_sequence == 0
    a.identity = hub.rounds.boxes["a"].identity
    assert a.identity.certificate_der != old.certificate_der
    a.say(hello(a))
    hub.until(lambda: a.of(Receipt))


def test_update_signed_with_a_replaced_certificate_is_refused(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    plan = hub.rounds.start()
    hub.rounds.join("a", "b")
    stale = hub.rounds.boxes["a"].seal(plan, 0.01)
    replace_certificate(hub, "a")
    a.identity = hub.rounds.boxes["a"].identity
    transfer = a.upload(plan.round_id, stale)
    hub.until(lambda: a.verdicts(transfer))
    assert a.verdicts(transfer)[0][0] is False
    assert "was revoked or replaced" in a.verdicts(transfer)[0][1]
    assert hub.rounds.member("a").state == "refused"


def test_update_larger_than_its_base_allows_is_refused_before_it_travels(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    plan = hub.rounds.start()
    hub.rounds.join("a", "b")
    limit = SHIPPED.stat().st_size
    transfer = a.upload(plan.round_id, bytes(limit + 1))
    hub.until(lambda: a.verdicts(transfer))
    accepted, reason = a.verdicts(transfer)[0]
    assert (accepted, str(limit + 1) in reason, str(limit) in reason) == (False, True, True)
    assert not list(hub.config.paths.rounds.glob("*/incoming/a/*"))


def test_hub_goes_on_with_its_new_certificate(hub: LinkedHub) -> None:
    a, files = hub.boxes["a"], hub.rounds.files
    hub.rounds.start()
    key = load_private_key(hub.config.paths.hub_key)
    renewed = files.authority.issue_hub(key.public_key(), days=30, now=time.time())
    hub.config.paths.hub_certificate.write_bytes(pem(renewed))
    hub.link.use_identity(load_identity(hub.config.paths.hub_key, hub.config.paths.hub_certificate))
    hub.until(lambda: hub.bus.connected)
    a.say(hello(a))
    hub.until(lambda: a.of(Receipt))
    assert a.hub_serials[-1] == serial_hex(renewed)


def test_old_message_is_refused(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.send_raw(envelope.seal(a.identity, "hub", hello(a), sequence=5, now=time.time() - 3600))
    hub.until(lambda: hub.refusals("a"))


def test_revoked_device_is_refused_at_once_whatever_the_broker_does(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    with hub.database.writing() as session:
        registry.revoke(session, "a", now=time.time())
    a.heartbeat()
    hub.until(lambda: hub.refusals("a"))
    assert hub.refusals("a") == ["a revoked device still speaks"]
    assert device(hub, "a").last_seen_at is None


def test_message_that_only_the_hub_says_is_refused(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.say(RoundClosed(message_id=new_id(), round_id="r0001", outcome="dropped"))
    a.send_raw(b"garbage")
    hub.until(lambda: len(hub.refusals("a")) == 2)
    assert "which only the hub says" in hub.refusals("a")[0]


def test_bundle_that_is_not_offered_is_not_sent(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.request("0" * 64)
    hub.until(lambda: hub.refusals("a"))
    assert "is not offered to a" in hub.refusals("a")[0]


def test_report_on_an_unknown_release_is_refused_with_a_receipt(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    a.report(7, "0" * 64, "activated")
    hub.until(lambda: a.of(Receipt))
    assert (a.of(Receipt)[0].accepted, a.of(Receipt)[0].reason[:21]) == (False, "there is no release 7")
    assert hub.refusals("a")


def test_garbage_chunks_disturb_nobody(hub: LinkedHub) -> None:
    a, b = hub.boxes["a"], hub.boxes["b"]
    plan = hub.rounds.start(min_devices=1)
    hub.rounds.join("a", "b")
    transfer = b.upload(plan.round_id, hub.rounds.boxes["b"].seal(plan, 0.01))
    for junk in (b"", b"short", bytes(100), bytes(60_000)):
        a.bus.publish_chunk(Topic(Direction.UP, "a", Channel.CHUNK), junk)
    hub.until(lambda: b.verdicts(transfer))
    assert b.verdicts(transfer) == [(True, "")]
    assert hub.refusals("a")


def test_a_renewed_certificate_goes_on_in_the_same_count(hub: LinkedHub) -> None:
    """Messages of the former one and of the new one, in and out of order: each counts once."""
    a = hub.boxes["a"]
    first = a._sequence.next()
    second = first + 1
    said = say_at(a, first + 5)
    hub.until(lambda: device(hub, "a").last_sequence == first + 5)
    former, a.identity = a.identity, renewed_identity(hub, "a")
    say_at(a, first + 7)
    hub.until(lambda: device(hub, "a").last_sequence == first + 7)
    say_at(a, second, identity=former)  # overtaken on its way
    a.send_raw(said)  # MQTT repeats
    say_at(a, first + 6)
    until_heard = device(hub, "a").last_seen_at
    a.heartbeat()
    hub.until(lambda: device(hub, "a").last_seen_at != until_heard and hub.bus.receive(0) is None)
    assert hub.refusals("a") == []
    say_at(a, first + 7)  # its number was used
    hub.until(lambda: hub.refusals("a"))
    assert "was seen before" in hub.refusals("a")[0]


def test_update_signed_with_a_renewed_certificate_still_counts(hub: LinkedHub) -> None:
    a = hub.boxes["a"]
    plan = hub.rounds.start()
    hub.rounds.join("a", "b")
    sealed = hub.rounds.boxes["a"].seal(plan, 0.01)
    a.identity = renewed_identity(hub, "a")
    transfer = a.upload(plan.round_id, sealed)
    hub.until(lambda: a.verdicts(transfer))
    assert a.verdicts(transfer) == [(True, "")]


def say_at(box: BoxTwin, sequence: int, *, identity: Identity | None = None) -> bytes:
    answer = RoundAnswer(message_id=new_id(), round_id="r-none", joins=False, examples=0)
    return box.say(answer, identity=identity, sequence=sequence)


def renewed_identity(hub: LinkedHub, name: str) -> Identity:
    """Another certificate of the device, the former one as good as before."""
    certificate, key = hub.rounds.files.device_files(hub.rounds.folder, name)
    return load_identity(key, certificate)


def replace_certificate(hub: LinkedHub, name: str) -> None:
    """As enrolment does for a new token: another certificate, the former one revoked."""
    files = hub.rounds.files
    with hub.database.writing() as session:
        session.query(Certificate).filter_by(device=name).update({"revoked_at": time.time()})
    certificate, key = files.device_files(hub.rounds.folder, name)
    hub.rounds.boxes[name] = Box(name, load_identity(key, certificate))


def hello(box: BoxTwin) -> RoundAnswer:
    return RoundAnswer(message_id=new_id(), round_id="r0001", joins=True, examples=20)


def count(hub: LinkedHub, name: str) -> int:
    with hub.database.reading() as session:
        return sum(row.count for row in session.query(Refusal).filter_by(device=name))
