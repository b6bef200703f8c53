"""The link over a real Mosquitto, against a working twin of the hub: rounds, releases, refusals, kills at each hand-over."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest

from edge_agent import bundles, database, learn, ledger, status, update
from edge_agent.link import Link
from edge_agent.releases import Installer
from edge_agent.rounds import Event, State
from fleet_link import chunks, envelope, sealing
from fleet_link.files import write_durably
from fleet_link.messages import (
    BundleRequest,
    Heartbeat,
    ReleaseReport,
    RoundAnswer,
    RoundClosed,
    RoundPlan,
    TransferOffer,
    TransferReceipt,
)
from fleet_link.topics import Channel
from models.bundle import read_bundle
from tests.edge_agent.link_support import DEVICE, Box, HubTwin, Releases, make_box, make_plan, write_brightness_bundle
from tests.fleet_link.mosquitto_support import Mosquitto, TestAuthority

pytestmark = pytest.mark.slow


@dataclass
class House:
    """Broker, hub twin and one box with its link thread."""

    folder: Path
    authority: TestAuthority
    broker: Mosquitto
    hub: HubTwin
    box: Box
    clock_offset_s: float = 0.0
    _stop: threading.Event | None = None
    _thread: threading.Thread | None = None

    def start_link(self, *, hub_is_there: bool = True) -> None:
        """Gives back once the box has reported in: what is said before it has subscribed is lost, as with a real broker."""
        while self.hub.step():  # what the link said before it was stopped
            pass
        heard = len(self.hub.of(Heartbeat))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=Link(
                self.box.config, self.box.enrolled, self.box.holder, lambda: time.time() + self.clock_offset_s
            ).run,
            args=(self._stop,),
        )
        self._thread.start()
        if hub_is_there:
            self.until(lambda: len(self.hub.of(Heartbeat)) > heard)

    def stop_link(self) -> None:
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join()
        self._stop = None

    def until(self, fact: Callable[[], object]) -> None:
        self.hub.until(fact)

    def alarms(self) -> str:
        beats = self.hub.of(Heartbeat)
        return " | ".join(beats[-1].alarms) if beats else ""

    def plan(self, **changes: object) -> RoundPlan:
        return make_plan(self.box.holder.current.digest, self.hub.public_key, **changes)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    authority = TestAuthority()
    hub_folder = tmp_path / "hub"
    hub_folder.mkdir()
    with TemporaryDirectory(prefix="broker-") as broker_folder:  # Mosquitto drops root: not below pytest's own folder
        broker = Mosquitto(Path(broker_folder), authority)
        broker.start()
        hub_identity = authority.issue("hub")
        hub = HubTwin(broker.config(hub_identity), hub_identity, authority.trust, hub_folder)
        made = House(tmp_path, authority, broker, hub, make_box(tmp_path, authority, broker.port))
        yield made
        made.stop_link()
        hub.stop()
        broker.stop()
        made.box.db.close()


def teach(box: Box, count: int = 6) -> None:
    for number in range(count):
        box.add_reviewed(f"p{number}", bright=True, label="nodule")
    learn.collect(box.db, box.data_dir, box.holder.current.reader.bundle.manifest, 0.25)
    box.db.execute("UPDATE examples SET split = 'train'")


def seal(house: House, round_id: str = "round-1", size: int = 2) -> bytes:
    """What the learner does after its child has ended; `size` values make the update as long as needed."""
    box = house.box
    found = ledger.find(box.db, round_id)
    assert found is not None
    change = {"head.weight": np.random.default_rng(1).normal(size=size).astype(np.float32)}
    sealed = update.build(change, found.plan, box.enrolled.identity, 6).sealed
    path = f"updates/{round_id}.sealed"
    write_durably(box.data_dir / path, sealed)
    offer = ledger.offer_of(box.data_dir / path, round_id, DEVICE)
    ledger.apply(
        box.db, box.data_dir, round_id, Event.SEALED, time.time(), ledger.Outcome(update=offer, update_path=path)
    )
    return sealed


def join(house: House, **changes: object) -> None:
    teach(house.box)
    house.start_link()
    house.hub.say(house.plan(**changes))
    house.until(lambda: house.hub.of(RoundAnswer))
    assert house.hub.of(RoundAnswer)[-1].joins


# --- presence -------------------------------------------------------------------------------------


def test_the_box_reports_in_and_keeps_reporting(house: House) -> None:
    house.start_link()
    house.until(lambda: len(house.hub.of(Heartbeat)) >= 3)
    beat = house.hub.of(Heartbeat)[-1]
    assert beat.bundle_digest == house.box.holder.current.digest
    assert database.counter(house.box.db, "hub_connected") == 1
    house.stop_link()
    assert database.counter(house.box.db, "hub_connected") == 0
    assert database.counter(house.box.db, "bytes_sent") > 1000


def test_a_change_is_told_at_once(tmp_path: Path, house: House) -> None:
    house.box.config = make_box(tmp_path, house.authority, house.broker.port, hub={"heartbeat_s": 1000.0}).config
    house.start_link()
    house.until(lambda: house.hub.of(Heartbeat))
    house.hub.say(make_plan("b" * 64, house.hub.public_key))
    house.until(lambda: any(beat.rounds for beat in house.hub.of(Heartbeat)))
    assert house.hub.of(Heartbeat)[-1].rounds[0].state == "declined"


# --- rounds ---------------------------------------------------------------------------------------


def test_a_round_from_plan_to_close(house: House) -> None:
    join(house)
    assert house.box.state_of("round-1") == State.TRAINING
    sealed = seal(house)
    house.until(lambda: house.box.state_of("round-1") == State.DELIVERED)
    assert house.hub.updates["round-1"] == sealed
    opened = sealing.open_update(
        sealed,
        private_key=house.hub.sealing_key,
        trust=house.authority.trust,
        sender=DEVICE,
        plan=house.plan(deadline_unix_s=ledger.find(house.box.db, "round-1").plan.deadline_unix_s),  # type: ignore[union-attr]
        now=time.time(),
    )
    assert opened.examples == 6
    house.hub.say(RoundClosed(message_id="c" * 32, round_id="round-1", outcome="released"))
    house.until(lambda: house.box.state_of("round-1") == State.CLOSED)
    assert not list((house.box.data_dir / "updates").iterdir())
    house.until(lambda: not house.box.rows("link_outbox"))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"allow_unsafe_open_rounds": False}, "policy.allow_unsafe_open_rounds = false"),
        ({"weights_may_leave": ["norms"]}, "all (policy.weights_may_leave = norms)"),
    ],
)
def test_a_site_that_does_not_allow_it_says_why(
    tmp_path: Path, house: House, policy: dict[str, object], reason: str
) -> None:
    house.box.config = make_box(tmp_path, house.authority, house.broker.port, policy=policy).config
    teach(house.box)
    house.start_link()
    house.hub.say(house.plan())
    house.until(lambda: house.hub.of(RoundAnswer))
    (answer,) = house.hub.of(RoundAnswer)
    assert not answer.joins
    assert reason in answer.reason
    house.until(lambda: any(beat.rounds for beat in house.hub.of(Heartbeat)))
    assert reason in house.hub.of(Heartbeat)[-1].rounds[0].reason
    assert reason in status.gather(house.box.config).rounds[0]["reason"]


def test_an_answer_is_said_until_the_hub_has_it(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.link.RESEND_S", 0.2)
    house.hub.receipts = False
    join(house)
    house.until(lambda: len(house.hub.of(RoundAnswer)) >= 3)
    assert len({answer.message_id for answer in house.hub.of(RoundAnswer)}) == 1
    house.hub.receipts = True
    house.until(lambda: not house.box.rows("link_outbox"))


def test_a_hub_that_missed_the_answer_is_told_again(house: House) -> None:
    join(house)
    house.until(lambda: not house.box.rows("link_outbox"))
    house.hub.say(house.plan(epochs=5))  # the first plan of a round counts
    house.until(lambda: len(house.hub.of(RoundAnswer)) == 2)
    assert ledger.find(house.box.db, "round-1").plan.epochs == 1  # type: ignore[union-attr]


def test_an_update_that_the_hub_refuses_ends_the_round_with_its_reason(house: House) -> None:
    house.hub.refuse_updates = "wrong shape"
    join(house)
    seal(house)
    house.until(lambda: house.box.state_of("round-1") == State.CLOSED)
    assert "wrong shape" in house.box.rows("rounds")[0]["reason"]
    assert house.box.rows("transfers_out") == []


def test_a_round_closed_by_the_hub_is_over_for_the_learner(house: House) -> None:
    join(house)
    house.hub.say(RoundClosed(message_id="c" * 32, round_id="round-1", outcome="dropped", reason="too few"))
    house.until(lambda: house.box.state_of("round-1") == State.CLOSED)
    assert house.box.rows("rounds")[0]["reason"] == "too few"


def test_a_deadline_ends_a_training(house: House) -> None:
    join(house, deadline_unix_s=time.time() + 4.0)
    house.until(lambda: house.box.state_of("round-1") == State.CLOSED)
    house.until(lambda: not house.hub.of(RoundAnswer)[-1].joins)
    assert "deadline" in house.box.rows("rounds")[0]["reason"]


def test_an_invitation_waits_for_its_base_bundle(house: House) -> None:
    teach(house.box)
    digest = "b" * 64
    house.box.db.execute("INSERT INTO bundles VALUES (?, 2, 'x', 'offered', '', 0)", (digest,))
    house.start_link()
    house.hub.say(make_plan(digest, house.hub.public_key))
    house.until(lambda: house.box.state_of("round-1") == State.INVITED)
    path = house.box.data_dir / bundles.path_of(digest)
    path.write_bytes(b"here")
    house.box.db.execute("UPDATE bundles SET state = 'previous', path = ?", (bundles.path_of(digest),))
    house.until(lambda: house.hub.of(RoundAnswer))
    assert house.hub.of(RoundAnswer)[0].joins


def test_a_lost_update_file_is_trained_again(house: House) -> None:
    join(house)
    house.stop_link()
    seal(house)
    (house.box.data_dir / "updates" / "round-1.sealed").unlink()
    house.start_link()
    house.until(lambda: house.box.state_of("round-1") == State.TRAINING)
    assert house.box.rows("transfers_out") == []
    seal(house)
    house.until(lambda: house.box.state_of("round-1") == State.DELIVERED)


def test_a_hub_that_forgot_the_update_gets_it_again(house: House) -> None:
    """Restored from a backup, it invites anew; round ids are of the shape r0001-<8 hex>."""
    round_id = "r0001-0123abcd"
    join(house, round_id=round_id)
    sealed = seal(house, round_id)
    house.until(lambda: house.box.state_of(round_id) == State.DELIVERED)
    house.hub.updates.clear()
    house.hub.heard.clear()
    house.hub.say(house.plan(round_id=round_id))
    house.until(lambda: house.hub.of(RoundAnswer) and round_id in house.hub.updates)
    assert house.hub.of(RoundAnswer)[0].joins
    assert house.hub.updates[round_id] == sealed
    house.until(lambda: house.box.state_of(round_id) == State.DELIVERED)


# --- what stands in the way -----------------------------------------------------------------------


def test_a_bad_file_silences_no_heartbeat(house: House) -> None:
    """An update that lies there as a folder cannot be read; the link's other work goes on, and the hub hears of it."""
    (house.box.data_dir / "updates" / "odd.sealed").mkdir(parents=True)
    size = (house.box.data_dir / "updates" / "odd.sealed").stat().st_size
    house.box.db.execute(
        "INSERT INTO transfers_out VALUES (?, 'update', 'odd', 'updates/odd.sealed', ?, ?, 0)",
        ("5" * 32, "a" * 64, size),
    )
    house.start_link()
    house.until(lambda: "odd.sealed" in house.alarms())
    house.hub.say(house.plan())
    house.until(lambda: house.hub.of(RoundAnswer))


def test_a_deleted_secret_that_was_being_read_leaves_the_disk_when_the_link_looks_again(house: House) -> None:
    join(house)
    secret, reader = os.urandom(40), database.connect(house.box.data_dir)
    files = [house.box.data_dir / name for name in ("box.db", "box.db-wal")]
    house.box.db.execute("INSERT INTO masked_parts VALUES ('round-1', ?)", (secret,))
    reader.execute("BEGIN")
    assert reader.execute("SELECT part FROM masked_parts").fetchone()["part"] == secret
    with database.transaction(house.box.db):
        house.box.db.execute("DELETE FROM masked_parts")
        database.note_secret_deleted(house.box.db)
    looked = len(house.hub.of(Heartbeat))
    house.until(lambda: len(house.hub.of(Heartbeat)) > looked)
    assert any(secret in path.read_bytes() for path in files)
    reader.execute("COMMIT")
    reader.close()
    house.until(lambda: not any(secret in path.read_bytes() for path in files))


def test_a_message_that_cannot_be_sent_silences_no_heartbeat(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.box.db.execute("INSERT INTO link_outbox VALUES (?, ?, 0)", ("5" * 32, b"of a newer software"))
    house.start_link()
    house.until(lambda: len(house.hub.of(Heartbeat)) >= 3)
    assert caplog.text.count("not a message of this fleet") == 1


def test_what_waits_for_the_site_is_told_at_once(tmp_path: Path, house: House) -> None:
    house.box.config = make_box(tmp_path, house.authority, house.broker.port, hub={"heartbeat_s": 1000.0}).config
    house.start_link()
    database.raise_alarm(house.box.db, "release 2", "release 2 waits: no space", time.time())
    house.until(lambda: "release 2 waits: no space" in house.alarms())
    database.end_alarm(house.box.db, "release 2")
    house.until(lambda: house.alarms() == "")


def test_the_site_says_where_the_hub_is_now(tmp_path: Path, house: House) -> None:
    """The hub of the enrolment is gone: another name, another port."""
    moved = {"url": "https://localhost:8443", "mqtt_port": house.broker.port, "heartbeat_s": 0.5}
    house.box = make_box(tmp_path, house.authority, 1, hub=moved)
    house.start_link()
    assert house.hub.of(Heartbeat)


# --- store and forward ----------------------------------------------------------------------------


def test_a_broker_killed_in_mid_transfer(house: House) -> None:
    join(house)
    house.hub.room = 2_000_000
    sealed = seal(house, size=6_000_000)
    house.until(lambda: house.hub.room <= 0)
    house.broker.kill()
    house.hub.room = 1 << 40
    house.broker.start()
    house.until(lambda: house.box.state_of("round-1") == State.DELIVERED)
    assert house.hub.updates["round-1"] == sealed


def test_a_box_stopped_in_mid_transfer_resumes(house: House) -> None:
    join(house)
    house.hub.room = 5_000_000
    sealed = seal(house, size=20_000_000)
    house.until(lambda: house.hub.room <= 0)
    house.stop_link()
    house.hub.room = 1 << 40
    before = database.counter(house.box.db, "bytes_sent")
    house.start_link()
    house.until(lambda: house.box.state_of("round-1") == State.DELIVERED)
    assert house.hub.updates["round-1"] == sealed
    house.stop_link()
    assert database.counter(house.box.db, "bytes_sent") - before < len(sealed) - 4_000_000


def test_with_the_hub_away_the_box_keeps_what_it_has_to_say(house: House) -> None:
    join(house)
    house.stop_link()
    house.broker.kill()
    house.start_link(hub_is_there=False)
    seal(house)
    ledger.enqueue(
        house.box.db,
        ReleaseReport(message_id="d" * 32, release_version=2, bundle_digest="e" * 64, outcome="activated"),
        time.time(),
    )
    house.broker.start()
    house.until(lambda: house.hub.of(ReleaseReport))
    house.until(lambda: house.box.state_of("round-1") == State.DELIVERED)
    house.until(lambda: not house.box.rows("link_outbox"))


# --- releases -------------------------------------------------------------------------------------


@pytest.fixture
def signed(house: House) -> Releases:
    made = Releases()
    made.trusted_by(house.box.enrolled.folder)
    return made


def candidate(house: House) -> Path:
    path = house.folder / "candidate.bundle"
    digest = write_brightness_bundle(path, slope=20.0, version="2")
    house.hub.bundles[digest] = path
    return path


def state_of(house: House, digest: str) -> str:
    return next((row["state"] for row in house.box.rows("bundles") if row["bundle_digest"] == digest), "")


def test_a_release_from_offer_to_report(house: House, signed: Releases) -> None:
    offer = signed.offer(candidate(house), 2)
    house.start_link()
    house.hub.say(offer)
    house.until(lambda: state_of(house, offer.bundle_digest) == "fetched")
    house.until(lambda: house.hub.of(TransferReceipt))
    assert house.hub.of(TransferReceipt)[0].accepted
    Installer(house.box.config, house.box.holder, time.time).step(house.box.db, threading.Event())
    house.until(lambda: house.hub.of(ReleaseReport))
    assert house.hub.of(ReleaseReport)[0].outcome == "activated"
    house.until(lambda: house.hub.of(Heartbeat)[-1].release_version == 2)


def test_a_bundle_that_arrives_damaged_is_refused_and_may_come_again(house: House, signed: Releases) -> None:
    offer = signed.offer(candidate(house), 2)
    house.hub.corrupt = lambda frame: frame[:-1] + bytes([frame[-1] ^ 1])
    house.start_link()
    house.hub.say(offer)
    house.until(lambda: house.hub.of(TransferReceipt))
    assert not house.hub.of(TransferReceipt)[0].accepted
    house.until(lambda: house.hub.of(ReleaseReport))
    assert "digest" in house.hub.of(ReleaseReport)[0].reason
    assert state_of(house, offer.bundle_digest) == ""
    house.hub.corrupt = lambda frame: frame
    house.hub.say(offer)
    house.until(lambda: state_of(house, offer.bundle_digest) == "fetched")


def test_a_release_signed_by_somebody_else_raises_an_alarm(house: House, signed: Releases) -> None:
    offer = Releases().offer(candidate(house), 2)
    house.start_link()
    house.hub.say(offer)
    house.until(lambda: house.hub.of(ReleaseReport))
    assert house.hub.of(ReleaseReport)[0].outcome == "refused"
    house.until(lambda: "release 2 refused" in house.alarms())
    assert house.hub.of(BundleRequest) == []


def test_a_bundle_nobody_asked_for_is_refused(house: House) -> None:
    path = candidate(house)
    digest = read_bundle(path).digest
    house.start_link()
    house.hub.say(chunks.new_offer(path, kind="bundle", subject=digest, transfer_id="5" * 32, message_id="5" * 32))
    house.until(lambda: house.hub.of(TransferReceipt))
    assert house.hub.of(TransferReceipt)[0].reason == "this box has not asked for it"
    assert not list((house.box.data_dir / "incoming").iterdir())


def test_a_transfer_with_another_digest_than_the_release_is_refused(house: House, signed: Releases) -> None:
    path = candidate(house)
    release = signed.offer(path, 2)
    house.hub.bundles.clear()
    house.box.db.execute("INSERT INTO bundles VALUES (?, 2, 'x', 'offered', '', 0)", (release.bundle_digest,))
    offer = chunks.new_offer(
        house.box.shipped, kind="bundle", subject=release.bundle_digest, transfer_id="5" * 32, message_id="5" * 32
    )
    house.start_link()
    house.hub.say(offer)
    house.until(lambda: house.hub.of(TransferReceipt))
    assert "digest is not that of the release" in house.hub.of(TransferReceipt)[0].reason


def test_a_box_stopped_in_mid_download_resumes(house: House, signed: Releases) -> None:
    path = candidate(house)
    offer = signed.offer(path, 2)
    house.start_link()
    house.hub.corrupt = lambda frame: frame[:-1] if frame[16:20] == b"\0\0\0\0" else frame  # never whole
    house.hub.say(offer)
    house.until(lambda: house.hub.of(BundleRequest))
    house.stop_link()
    house.hub.corrupt = lambda frame: frame
    house.start_link()
    house.until(lambda: state_of(house, offer.bundle_digest) == "fetched")


# --- wrong bytes on the wire ----------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"\x00" * 40, b"\xff" * 2000, b'{"json": true}'], ids=range(4))
def test_bytes_that_are_no_message_change_nothing(house: House, payload: bytes) -> None:
    house.start_link()
    house.until(lambda: house.hub.of(Heartbeat))
    house.hub.put(payload, Channel.MESSAGE)
    house.hub.put(payload, Channel.CHUNK)
    house.until(lambda: house.alarms())
    house.hub.say(house.plan())
    house.until(lambda: house.hub.of(RoundAnswer))


def sealed_by(house: House, name: str, authority: TestAuthority, sequence: int) -> bytes:
    identity = authority.issue(name)
    return envelope.seal(identity, DEVICE, house.plan(), sequence=sequence, now=time.time())


@pytest.mark.parametrize("who", ["another fleet's hub", "another box"])
def test_a_plan_that_the_hub_did_not_sign_is_refused(house: House, who: str) -> None:
    teach(house.box)
    house.start_link()
    house.until(lambda: house.hub.of(Heartbeat))
    if who == "another box":
        house.hub.put(sealed_by(house, "box-2", house.authority, 2**60))
    else:
        house.hub.put(sealed_by(house, "hub", TestAuthority(), 2**60))
    house.until(lambda: house.alarms())
    assert house.box.rows("rounds") == []


def test_a_changed_message_is_refused(house: House) -> None:
    house.start_link()
    sealed = envelope.seal(house.hub.identity, DEVICE, house.plan(), sequence=int(time.time() * 1e6), now=time.time())
    house.hub.put(sealed.replace(b"round-1", b"round-2"))
    house.until(lambda: "signature" in house.alarms())
    assert house.box.rows("rounds") == []


def test_a_replayed_message_is_dropped_also_after_a_restart(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    teach(house.box)
    house.start_link()
    said = house.hub.say(house.plan())
    house.until(lambda: house.hub.of(RoundAnswer))
    house.box.db.execute("DELETE FROM rounds")
    house.hub.put(said)
    house.until(lambda: "came again" in caplog.text)
    house.stop_link()
    caplog.clear()
    house.start_link()
    house.hub.put(said)
    house.until(lambda: "seen before" in caplog.text)
    assert house.box.rows("rounds") == []
    assert house.alarms() == ""


def test_a_message_that_only_a_box_says_is_refused(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.start_link()
    house.hub.say(RoundAnswer(message_id="a" * 32, round_id="round-1", joins=True, examples=1))
    house.until(lambda: "which only a box says" in caplog.text)


def test_an_unknown_receipt_and_an_unknown_progress_change_nothing(house: House) -> None:
    join(house)
    house.hub.say(TransferReceipt(message_id="1" * 32, transfer_id="2" * 32, accepted=False, reason="?"))
    house.hub.say(RoundClosed(message_id="3" * 32, round_id="never-heard", outcome="dropped"))
    seal(house)
    house.until(lambda: house.box.state_of("round-1") == State.DELIVERED)


def test_an_update_offer_from_the_hub_is_refused(house: House) -> None:
    house.start_link()
    offer = TransferOffer(
        message_id="1" * 32,
        transfer_id="1" * 32,
        kind="update",
        subject="round-1",
        sha256="a" * 64,
        size=5,
        chunk_bytes=1024,
    )
    house.hub.say(offer)
    house.until(lambda: house.hub.of(TransferReceipt))
    assert not house.hub.of(TransferReceipt)[0].accepted
    assert msgspec.structs.asdict(house.hub.of(TransferReceipt)[0])["transfer_id"] == "1" * 32


def test_a_clock_set_back_before_a_restart_never_lowers_the_sequence(house: House) -> None:
    house.start_link()
    house.stop_link()
    before = len(house.hub.sequences)
    house.clock_offset_s = -600.0
    house.start_link()
    assert len(house.hub.sequences) > before
    assert house.hub.sequences == sorted(set(house.hub.sequences))
