"""Releases: what TUF does not vouch for, what is damaged, what is worse here; and the swap."""

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from edge_agent import bundles, database, hub_change, identity, invitations, ledger, releases
from edge_agent.config import Config
from edge_agent.evaluation import Evaluation
from edge_agent.infer import Reader
from edge_agent.ledger import Outcome
from edge_agent.releases import Installer
from edge_agent.rounds import Event
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.files import write_durably
from fleet_link.messages import ReleaseReport
from models import bundle as bundle_file
from models.bundle import read_bundle
from tests.edge_agent.link_support import DEVICE, Box, Releases, make_box, make_plan, write_brightness_bundle
from tests.fleet_link.mosquitto_support import TestAuthority, write_identity

AUTHORITY = TestAuthority()
GO_ON = threading.Event()


@pytest.fixture
def hub() -> Releases:
    return Releases()


@pytest.fixture
def box(tmp_path: Path, hub: Releases) -> Iterator[Box]:
    made = make_box(tmp_path, AUTHORITY)
    hub.trusted_by(made.enrolled.folder)
    yield made
    made.db.close()


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    path = tmp_path / "candidate.bundle"
    write_brightness_bundle(path, slope=20.0, version="2")
    return path


@pytest.fixture
def worse(tmp_path: Path) -> Path:
    path = tmp_path / "worse.bundle"
    write_brightness_bundle(path, slope=-10.0, version="3")
    return path


def take(box: Box, offer: object) -> object:
    return releases.take_offer(box.db, box.enrolled.folder, offer, time.time())  # type: ignore[arg-type]


def fetch(box: Box, bundle: Path, digest: str) -> None:
    (box.data_dir / bundles.path_of(digest)).write_bytes(bundle.read_bytes())
    releases.arrived(box.db, digest, time.time())


def install(box: Box) -> None:
    Installer(box.config, box.holder, time.time).step(box.db, GO_ON)


def bundle_rows(box: Box) -> dict[str, tuple[str, int]]:
    return {row["bundle_digest"]: (row["state"], row["release_version"]) for row in box.rows("bundles")}


def reports(box: Box) -> list[ReleaseReport]:
    return [message for message in ledger.pending(box.db) if isinstance(message, ReleaseReport)]


def add_heldout(box: Box, count: int) -> None:
    for number in range(count):
        bright = number % 2 == 0
        series_no = box.add_reviewed(f"h{number}", bright=bright, label="nodule" if bright else "normal")
        box.db.execute(
            "INSERT INTO examples VALUES (?, ?, 'XR', ?, 'heldout', 'x')",
            (series_no, series_no, "nodule" if bright else "normal"),
        )


# --- offers ---------------------------------------------------------------------------------------


def test_a_signed_offer_is_asked_for(box: Box, hub: Releases, candidate: Path) -> None:
    offer = hub.offer(candidate, 2)
    request = take(box, offer)
    assert request is not None
    assert bundle_rows(box)[offer.bundle_digest] == ("offered", 2)
    assert take(box, offer) is not None  # the request was lost
    assert reports(box) == []


def test_metadata_signed_by_somebody_else_is_refused(box: Box, candidate: Path) -> None:
    offer = Releases().offer(candidate, 2)
    with pytest.raises(TrustError, match="release 2 refused"):
        take(box, offer)
    assert offer.bundle_digest not in bundle_rows(box)
    assert [report.outcome for report in reports(box)] == ["refused"]


@pytest.mark.parametrize("part", ["timestamp", "snapshot", "targets"])
def test_changed_metadata_is_refused(box: Box, hub: Releases, candidate: Path, part: str) -> None:
    offer = hub.offer(candidate, 2)
    changed = getattr(offer, part).replace(b'"version"', b'"vers1on"', 1)
    assert changed != getattr(offer, part)
    with pytest.raises(TrustError):
        take(box, msgspec.structs.replace(offer, **{part: changed}))


@pytest.mark.parametrize("part", ["timestamp", "snapshot", "targets"])
def test_metadata_that_is_none_is_refused(box: Box, hub: Releases, candidate: Path, part: str) -> None:
    offer = msgspec.structs.replace(hub.offer(candidate, 2), **{part: b"\x00 no metadata"})
    with pytest.raises(TrustError):
        take(box, offer)


def test_a_root_that_is_none_is_refused(box: Box, hub: Releases, candidate: Path) -> None:
    with pytest.raises(TrustError):
        take(box, msgspec.structs.replace(hub.offer(candidate, 2), roots=(b"{}",)))


def test_an_older_state_is_refused(box: Box, hub: Releases, candidate: Path, worse: Path) -> None:
    old = hub.offer(candidate, 2)
    take(box, hub.offer(worse, 3))
    with pytest.raises(TrustError):
        take(box, old)


@pytest.mark.parametrize("lie", [{"bundle_digest": "f" * 64}, {"bundle_size": 5}, {"release_version": 9}])
def test_an_offer_that_differs_from_its_metadata_is_refused(
    box: Box, hub: Releases, candidate: Path, lie: dict[str, object]
) -> None:
    with pytest.raises(TrustError, match="does not name"):
        take(box, msgspec.structs.replace(hub.offer(candidate, 2), **lie))  # type: ignore[arg-type]


def test_stale_metadata_is_tried_again_later(box: Box, hub: Releases, candidate: Path) -> None:
    with pytest.raises(LinkError, match="out of date"):
        take(box, hub.offer(candidate, 2, days=-1.0))
    assert reports(box) == []
    assert take(box, hub.offer(candidate, 2)) is not None


def test_an_offer_of_what_runs_already_is_only_reported(box: Box, hub: Releases) -> None:
    offer = hub.offer(box.shipped, 1)
    assert take(box, offer) is None
    assert take(box, offer) is None
    assert [(r.outcome, r.release_version) for r in reports(box)] == [("activated", 1)]


def test_a_refused_bundle_is_refused_again_with_its_reason(box: Box, hub: Releases, worse: Path) -> None:
    add_heldout(box, 6)
    offer = hub.offer(worse, 3)
    take(box, offer)
    fetch(box, worse, offer.bundle_digest)
    install(box)
    ledger.received(box.db, reports(box)[0].message_id)
    assert take(box, offer) is None
    assert "clearly worse" in reports(box)[0].reason


def test_the_bundle_before_needs_no_transfer(box: Box, hub: Releases, candidate: Path) -> None:
    first = box.holder.current.digest
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    install(box)
    assert take(box, hub.offer(box.shipped, 3)) is None
    install(box)
    assert (box.holder.current.digest, box.holder.current.release_version) == (first, 3)


# --- installing -----------------------------------------------------------------------------------


def test_a_better_bundle_is_taken_into_use(box: Box, hub: Releases, candidate: Path) -> None:
    add_heldout(box, 4)
    before = box.holder.current
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    install(box)
    assert bundle_rows(box) == {before.digest: ("previous", 0), offer.bundle_digest: ("active", 2)}
    assert box.holder.current.digest == box.holder.current.reader.bundle.digest == offer.bundle_digest
    (report,) = reports(box)
    assert (report.outcome, report.heldout) == ("activated", 4)
    assert (report.heldout_correct_before, report.heldout_correct_after) == (4, 4)


def test_a_worse_bundle_is_refused_and_nothing_changes(box: Box, hub: Releases, worse: Path) -> None:
    add_heldout(box, 6)
    before = box.holder.current
    offer = hub.offer(worse, 3)
    take(box, offer)
    fetch(box, worse, offer.bundle_digest)
    install(box)
    assert box.holder.current is before
    assert bundle_rows(box)[before.digest] == ("active", 0)
    (report,) = reports(box)
    assert report.outcome == "refused"
    assert report.reason == "clearly worse on this site's held-out cases: 6 of 6 right before, 0 after"
    assert (report.heldout_correct_before, report.heldout_correct_after) == (6, 0)
    assert not (box.data_dir / bundles.path_of(offer.bundle_digest)).exists()


def test_a_damaged_file_is_refused(box: Box, hub: Releases, candidate: Path) -> None:
    before = box.holder.current
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    (box.data_dir / bundles.path_of(offer.bundle_digest)).write_bytes(candidate.read_bytes()[:-1] + b"x")
    install(box)
    assert box.holder.current is before
    assert [report.outcome for report in reports(box)] == ["refused"]


def test_another_valid_bundle_under_the_name_is_refused(box: Box, hub: Releases, candidate: Path, worse: Path) -> None:
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, worse, offer.bundle_digest)
    install(box)
    assert "another digest" in reports(box)[0].reason


def test_a_bundle_with_a_wrong_known_answer_is_refused(box: Box, hub: Releases, tmp_path: Path) -> None:
    honest = bundle_file.read_bundle(box.shipped)
    liar = tmp_path / "liar.bundle"
    outputs = {name: value + 1 for name, value in honest.known_outputs.items()}
    bundle_file.write_bundle(
        liar,
        bundle_file.BundleParts(honest.manifest, honest.onnx, honest.weights, honest.known_inputs, outputs, "liar"),
    )
    offer = hub.offer(liar, 2)
    take(box, offer)
    fetch(box, liar, offer.bundle_digest)
    install(box)
    assert "known-answer" in reports(box)[0].reason


def test_a_stop_in_the_middle_leaves_the_work_for_the_next_start(box: Box, hub: Releases, candidate: Path) -> None:
    add_heldout(box, 2)
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    stopped = threading.Event()
    stopped.set()
    Installer(box.config, box.holder, time.time).step(box.db, stopped)
    assert bundle_rows(box)[offer.bundle_digest] == ("fetched", 2)
    install(box)
    assert box.holder.current.release_version == 2


def test_a_verdict_on_an_older_result_does_not_judge(box: Box, hub: Releases, candidate: Path) -> None:
    """Late images made a second result of h0, which nobody has reviewed; h1 is being read again."""
    add_heldout(box, 3)
    box.db.execute("UPDATE series SET version = 2 WHERE series_no = 1")
    box.db.execute("UPDATE series SET state = 'due' WHERE series_no = 2")
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    install(box)
    assert reports(box)[0].heldout == 1


def test_a_heldout_case_that_cannot_be_read_does_not_count(box: Box, hub: Releases, candidate: Path) -> None:
    add_heldout(box, 3)
    (box.data_dir / "h1.dcm").write_bytes(b"gone")
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    install(box)
    assert reports(box)[0].heldout == 2


@pytest.mark.parametrize(
    ("heldout", "before", "after", "worse"),
    [
        (0, 0, 0, False),
        (10, 10, 9, False),
        (10, 10, 8, True),
        (40, 40, 38, False),
        (40, 40, 37, True),
        (9, 3, 9, False),
    ],
)
def test_clearly_worse_is_more_than_one_case_and_five_points(
    heldout: int, before: int, after: int, worse: bool
) -> None:
    assert Evaluation(heldout, before, after).is_clearly_worse is worse


# --- this site's trouble --------------------------------------------------------------------------


def fetched_but_unreadable(box: Box, hub: Releases, candidate: Path) -> Path:
    """The disk gives no bytes: a folder lies where the file should be."""
    offer = hub.offer(candidate, 2)
    take(box, offer)
    path = box.data_dir / bundles.path_of(offer.bundle_digest)
    path.mkdir()
    releases.arrived(box.db, offer.bundle_digest, time.time())
    return path


def test_a_bundle_that_cannot_be_opened_now_is_kept_and_told_once(
    box: Box, hub: Releases, candidate: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "RETRY_S", 0.0)
    path = fetched_but_unreadable(box, hub, candidate)
    install(box)
    install(box)
    assert bundle_rows(box)[path.stem] == ("fetched", 2)
    assert reports(box) == []
    (alarm,) = database.alarms(box.db)
    assert alarm.startswith("release 2 waits: ")
    assert caplog.text.count("release 2 waits") == 1
    assert "check the disk" in caplog.text
    path.rmdir()
    path.write_bytes(candidate.read_bytes())
    install(box)
    assert [report.outcome for report in reports(box)] == ["activated"]
    assert database.alarms(box.db) == []


def test_it_is_not_tried_again_at_once(box: Box, hub: Releases, candidate: Path) -> None:
    path = fetched_but_unreadable(box, hub, candidate)
    installer = Installer(box.config, box.holder, time.time)
    installer.step(box.db, GO_ON)
    path.rmdir()
    path.write_bytes(candidate.read_bytes())
    installer.step(box.db, GO_ON)
    assert bundle_rows(box)[path.stem] == ("fetched", 2)
    install(box)  # as after a restart
    assert box.holder.current.release_version == 2


def test_a_provider_that_is_not_there_leaves_the_release_for_later(box: Box, hub: Releases, candidate: Path) -> None:
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    without = replace(box.config, inference=replace(box.config.inference, providers=("NoSuchExecutionProvider",)))
    Installer(without, box.holder, time.time).step(box.db, GO_ON)
    assert bundle_rows(box)[offer.bundle_digest] == ("fetched", 2)
    install(box)
    assert box.holder.current.release_version == 2


def test_a_graph_that_is_none_is_the_bundles_fault(box: Box, hub: Releases, tmp_path: Path) -> None:
    honest, bad = bundle_file.read_bundle(box.shipped), tmp_path / "bad.bundle"
    parts = bundle_file.BundleParts(
        honest.manifest, b"no graph", honest.weights, honest.known_inputs, honest.known_outputs, "bad"
    )
    bundle_file.write_bundle(bad, parts)
    offer = hub.offer(bad, 2)
    take(box, offer)
    fetch(box, bad, offer.bundle_digest)
    install(box)
    assert bundle_rows(box)[offer.bundle_digest] == ("refused", 2)
    assert "graph" in reports(box)[0].reason


def test_an_active_bundle_that_cannot_be_opened_now_is_not_given_up(
    box: Box, hub: Releases, candidate: Path, tmp_path: Path
) -> None:
    digest = activate_second(box, hub, candidate)
    path = box.data_dir / bundles.path_of(digest)
    path.rename(tmp_path / "aside")
    path.mkdir()
    reading = bundles.load_active(box.db, box.config, time.time()).current
    assert reading.digest != digest
    assert bundle_rows(box)[digest] == ("active", 2)
    assert reports(box) == []
    assert database.alarms(box.db)
    path.rmdir()
    (tmp_path / "aside").rename(path)
    assert bundles.load_active(box.db, box.config, time.time()).current.digest == digest
    assert database.alarms(box.db) == []


# --- older releases, another hub ------------------------------------------------------------------


def test_an_older_release_than_the_one_in_use_is_refused(box: Box, hub: Releases, candidate: Path, worse: Path) -> None:
    activate_second_version(box, hub, candidate, 3)
    ledger.received(box.db, reports(box)[0].message_id)
    older = hub.offer(worse, 2)
    assert take(box, older) is None
    assert older.bundle_digest not in bundle_rows(box)
    (report,) = reports(box)
    assert (report.outcome, report.reason) == ("refused", "older than release 3, which is in use")


def test_a_release_that_was_overtaken_while_it_waited_is_refused(
    box: Box, hub: Releases, candidate: Path, worse: Path
) -> None:
    offer = hub.offer(worse, 2)
    take(box, offer)
    newer = hub.offer(candidate, 3)
    take(box, newer)
    fetch(box, candidate, newer.bundle_digest)
    install(box)
    fetch(box, worse, offer.bundle_digest)
    install(box)
    assert box.holder.current.release_version == 3
    assert [(r.release_version, r.outcome) for r in reports(box)] == [(3, "activated"), (2, "refused")]
    assert not (box.data_dir / bundles.path_of(offer.bundle_digest)).exists()
    assert take(box, hub.offer(worse, 4)) is not None  # the same bundle under a new number


def moved(box: Box) -> Box:
    """As the daemon at its start, after `edge-agent enroll --replace` at another hub."""
    box.enrolled.folder.ca.write_bytes(TestAuthority("elsewhere").pem)
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    box.holder = bundles.load_active(box.db, box.config, time.time())
    return box


def test_a_box_that_moved_keeps_its_bundle_and_takes_the_new_hubs_first_release(
    box: Box, hub: Releases, candidate: Path, worse: Path, tmp_path: Path
) -> None:
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    digest = activate_second_version(box, hub, candidate, 5)
    refused = hub.offer(worse, 4)
    take(box, refused)
    moved(box)
    assert (box.holder.current.digest, box.holder.current.release_version) == (digest, 0)
    assert bundles.load_active(box.db, box.config, time.time()).current.digest == digest
    assert reports(box) == []
    shutil.rmtree(box.enrolled.folder.tuf)  # `enroll` brings the new hub's
    box.enrolled.folder.tuf.mkdir()
    new_hub = Releases()
    new_hub.trusted_by(box.enrolled.folder)
    assert activate_second_version(box, new_hub, worse, 1) == box.holder.current.digest


def test_a_box_that_moved_leaves_the_rounds_of_its_old_hub(box: Box) -> None:
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    ledger.invite(box.db, make_plan("b" * 64, b"k" * 32), time.time())
    ledger.apply(box.db, box.data_dir, "round-1", Event.ADMITTED, time.time())
    moved(box)
    assert (box.state_of("round-1"), ledger.pending(box.db)) == ("closed", [])


def test_the_same_hub_changes_nothing(box: Box, hub: Releases, candidate: Path) -> None:
    for _ in range(2):
        hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    activate_second_version(box, hub, candidate, 2)
    before = box.rows("bundles"), box.rows("link_outbox")
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    assert (box.rows("bundles"), box.rows("link_outbox")) == before


def sealed_round(box: Box, round_id: str) -> Path:
    path = f"updates/{round_id}.sealed"
    write_durably(box.data_dir / path, b"sealed with the certificate of then")
    ledger.invite(box.db, make_plan("b" * 64, b"k" * 32, round_id=round_id), time.time())
    ledger.apply(box.db, box.data_dir, round_id, Event.ADMITTED, time.time(), Outcome(examples=2))
    offer = ledger.offer_of(box.data_dir / path, round_id, DEVICE)
    ledger.apply(box.db, box.data_dir, round_id, Event.SEALED, time.time(), Outcome(update=offer, update_path=path))
    return box.data_dir / path


def test_after_a_new_certificate_of_the_same_hub_updates_are_sealed_again(box: Box) -> None:
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    waiting, delivered = sealed_round(box, "r1"), sealed_round(box, "r2")
    ledger.apply(box.db, box.data_dir, "r2", Event.ACCEPTED, time.time())
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    assert (box.state_of("r1"), box.state_of("r2")) == ("uploading", "delivered")
    assert waiting.exists()
    assert delivered.exists()
    here = box.enrolled.folder
    write_identity(here.path, AUTHORITY.issue(DEVICE, to_days=90))
    (here.path / f"{DEVICE}.pem").rename(here.certificate)
    (here.path / f"{DEVICE}.key").rename(here.key)
    renewed = identity.load(box.data_dir)
    hub_change.follow(box.db, box.data_dir, renewed, time.time())
    assert (box.state_of("r1"), box.state_of("r2")) == ("training", "delivered")
    assert box.rows("transfers_out") == []
    invitations.take(
        box.db, box.config, box.enrolled.identity, make_plan("b" * 64, b"k" * 32, round_id="r2"), time.time()
    )
    assert box.state_of("r2") == "declined"
    ledger.apply(box.db, box.data_dir, "r1", Event.SEALED, time.time())
    hub_change.follow(box.db, box.data_dir, renewed, time.time())
    assert box.state_of("r1") == "uploading"  # once per change


# --- start-up -------------------------------------------------------------------------------------


def activate_second(box: Box, hub: Releases, candidate: Path) -> str:
    offer = hub.offer(candidate, 2)
    take(box, offer)
    fetch(box, candidate, offer.bundle_digest)
    install(box)
    ledger.received(box.db, reports(box)[0].message_id)
    return offer.bundle_digest


def test_the_active_bundle_survives_a_restart(box: Box, hub: Releases, candidate: Path) -> None:
    digest = activate_second(box, hub, candidate)
    loaded = bundles.load_active(box.db, box.config, time.time()).current
    assert (loaded.digest, loaded.release_version) == (digest, 2)


def test_a_damaged_active_bundle_rolls_back_and_says_so(
    box: Box, hub: Releases, candidate: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = box.holder.current.digest
    digest = activate_second(box, hub, candidate)
    (box.data_dir / bundles.path_of(digest)).write_bytes(b"damaged")
    loaded = bundles.load_active(box.db, box.config, time.time()).current
    assert (loaded.digest, loaded.release_version) == (first, 0)
    assert [report.outcome for report in reports(box)] == ["rolled-back"]
    assert bundle_rows(box)[digest][0] == "refused"
    assert "rolled back" in caplog.text


@pytest.mark.parametrize("only_shipped", [False, True])
def test_while_the_bundle_in_use_cannot_be_opened_it_is_said_what_helps_and_what_reads(
    box: Box, hub: Releases, candidate: Path, monkeypatch: pytest.MonkeyPatch, only_shipped: bool
) -> None:
    first, opening = box.holder.current.digest, bundles.open_reader
    digest = activate_second(box, hub, candidate)
    if only_shipped:
        box.db.execute("DELETE FROM bundles WHERE bundle_digest = ?", (first,))

    def no_memory(config: Config, path: Path) -> Reader:
        if path.stem == digest:
            raise SiteError("no memory", advice="free some")
        return opening(config, path)

    with monkeypatch.context() as patched:
        patched.setattr(bundles, "open_reader", no_memory)
        assert bundles.load_active(box.db, box.config, time.time()).current.digest == first
    (alarm,) = database.alarms(box.db)
    assert "no memory" in alarm
    assert "restart edge-agent to try it again" in alarm
    reads = bundles.file_that_reads(box.db, box.data_dir)
    assert reads is not None
    assert read_bundle(reads).digest == first
    assert bundles.load_active(box.db, box.config, time.time()).current.digest == digest
    assert bundles.file_that_reads(box.db, box.data_dir) == box.data_dir / bundles.path_of(digest)
    assert database.alarms(box.db) == []


def test_with_both_files_gone_the_shipped_bundle_reads(box: Box, hub: Releases, candidate: Path) -> None:
    first = box.holder.current.digest
    digest = activate_second(box, hub, candidate)
    for name in (first, digest):
        (box.data_dir / bundles.path_of(name)).unlink()
    loaded = bundles.load_active(box.db, box.config, time.time()).current
    assert (loaded.digest, loaded.release_version) == (first, 0)
    assert bundle_rows(box)[first] == ("active", 0)


def test_a_box_without_a_release_follows_its_software(box: Box, candidate: Path) -> None:
    box.shipped.write_bytes(candidate.read_bytes())
    loaded = bundles.load_active(box.db, box.config, time.time()).current
    assert loaded.reader.bundle.manifest.version == "2"
    assert sorted(state for state, _ in bundle_rows(box).values()) == ["active", "previous"]


def test_no_usable_bundle_at_all_is_said(box: Box) -> None:
    box.shipped.write_bytes(b"none")
    (box.data_dir / bundles.path_of(box.holder.current.digest)).unlink()
    with pytest.raises(SiteError, match=r"shipped\.bundle"):
        bundles.load_active(box.db, box.config, time.time())


def test_old_files_go_and_the_base_of_an_open_round_stays(box: Box, hub: Releases, tmp_path: Path) -> None:
    first = box.holder.current.digest
    ledger.invite(box.db, make_plan(first, b"k" * 32), time.time())
    digests = [first]
    for version in (2, 3, 4):
        path = tmp_path / f"{version}.bundle"
        write_brightness_bundle(path, slope=10.0 + version, version=str(version))
        digests.append(activate_second_version(box, hub, path, version))
    files = {path.stem for path in (box.data_dir / "bundles").glob("*.bundle")}
    assert files == {digests[0], digests[2], digests[3]}


def activate_second_version(box: Box, hub: Releases, path: Path, version: int) -> str:
    offer = hub.offer(path, version)
    take(box, offer)
    fetch(box, path, offer.bundle_digest)
    install(box)
    assert box.holder.current.release_version == version
    return offer.bundle_digest
