"""The signed repository, judged by python-tuf's own client, with a crash at every write."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Timestamp
from tuf.ngclient import FetcherInterface, Updater

from cloud_hub import releases
from cloud_hub.config import Config
from cloud_hub.database import Release as Row
from cloud_hub.releases import Repository
from fleet_link import files
from fleet_link.errors import SiteError
from fleet_link.messages import ReleaseOffer, encode
from models.bundle import SHIPPED, BundleParts, file_digest, read_bundle, write_bundle
from tests.cloud_hub.hub_support import HubFiles, make_hub_files
from tests.cloud_hub.round_support import needs_bundle

pytestmark = needs_bundle
NOW = datetime.now(UTC).timestamp()
DAY = 86400.0
ID = "0" * 32


class Offered(FetcherInterface):
    """A box's view of one offer."""

    def __init__(self, offer: ReleaseOffer) -> None:
        self._offer = offer

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rsplit("/", 1)[-1]
        known = {"timestamp.json": self._offer.timestamp}
        known |= {f"{n}.root.json": root for n, root in enumerate(self._offer.roots, start=1)}
        by_role = {"snapshot.json": self._offer.snapshot, "targets.json": self._offer.targets}
        content = known.get(name) or by_role.get(name.partition(".")[2])
        if content is None:
            raise exceptions.DownloadHTTPError(name, 404)
        yield content


class BoxTwin:
    """Keeps its trusted metadata between offers, as a box does."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._root = releases.root_bytes(config)

    def take(self, offer: ReleaseOffer) -> int:
        """Verify; gives the release version the targets vouch for."""
        updater = Updater(str(self._folder), "https://offered.invalid/", fetcher=Offered(offer), bootstrap=self._root)
        updater.refresh()
        target = updater.get_targetinfo(f"{offer.bundle_digest}.bundle")
        assert target is not None
        assert (target.hashes["sha256"], target.length) == (offer.bundle_digest, offer.bundle_size)
        return int(target.custom["release_version"])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubFiles]:
    made = make_hub_files(tmp_path / "hub")
    releases.init(made.config, SHIPPED, now=NOW)
    yield made
    made.database.close()


@pytest.fixture
def box(hub: HubFiles, tmp_path: Path) -> BoxTwin:
    return BoxTwin(tmp_path / "box", hub.config)


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    return another_bundle(tmp_path / "candidate.bundle", "r0001")


def another_bundle(path: Path, version: str) -> Path:
    base = read_bundle(SHIPPED)
    manifest = msgspec.structs.replace(base.manifest, version=version)
    write_bundle(path, BundleParts(manifest, base.onnx, base.weights, base.known_inputs, base.known_outputs, base.card))
    return path


def rows(hub: HubFiles) -> list[tuple[int, str | None]]:
    with hub.database.reading() as session:
        return [(row.release_version, row.round_id) for row in session.query(Row).order_by(Row.release_version)]


def test_init_publishes_release_1_and_twice_is_once(hub: HubFiles, box: BoxTwin) -> None:
    before = sorted(path.name for path in hub.config.paths.releases.iterdir())
    releases.init(hub.config, SHIPPED, now=NOW + 5)
    assert sorted(path.name for path in hub.config.paths.releases.iterdir()) == before
    assert rows(hub) == [(1, None)]
    repository = Repository(hub.config.paths)
    (first,) = repository.listed()
    assert (first.release_version, first.bundle_digest, first.round_id) == (1, file_digest(SHIPPED), "")
    assert box.take(repository.offer(first, message_id=ID)) == 1


def test_box_accepts_each_release_and_older_ones_stay_vouched_for(hub: HubFiles, box: BoxTwin, candidate: Path) -> None:
    repository = Repository(hub.config.paths)
    (first,) = repository.listed()
    second = repository.publish(candidate, round_id="r0001", now=NOW)
    assert [box.take(repository.offer(release, message_id=ID)) for release in (second, first)] == [2, 1]
    assert repository.bundle_path(second.bundle_digest).read_bytes() == candidate.read_bytes()
    encode(repository.offer(second, message_id=ID))  # fits one message


def test_publish_twice_is_once(hub: HubFiles, candidate: Path) -> None:
    repository = Repository(hub.config.paths)
    first, again = (repository.publish(candidate, round_id="r0001", now=NOW + n) for n in range(2))
    assert first == again
    assert [release.release_version for release in repository.listed()] == [1, 2]


class Killed(BaseException):
    """As kill -9: nothing after it runs."""


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("write", range(4))
def test_killed_at_any_write_the_old_release_is_whole_and_the_next_try_ends_it(
    hub: HubFiles, box: BoxTwin, candidate: Path, monkeypatch: pytest.MonkeyPatch, write: int, moment: str
) -> None:
    repository = Repository(hub.config.paths)
    (first,) = repository.listed()
    written: list[str] = []

    def write_then_die(path: Path, content: bytes, *, mode: int = 0o644) -> None:
        if len(written) == write and moment == "before":
            path.with_name(path.name + ".tmp").write_bytes(content[:10])
            raise Killed
        written.append(path.name)
        files.write_durably(path, content, mode=mode)
        if len(written) == write + 1:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(releases, "write_durably", write_then_die)
        with pytest.raises(Killed):
            repository.publish(candidate, round_id="r0001", now=NOW)
    after_crash = Repository(hub.config.paths)
    published = [release.release_version for release in after_crash.listed()]
    assert published == ([1, 2] if written[3:] else [1])  # the timestamp is the fourth and last
    assert box.take(after_crash.offer(first, message_id=ID)) == 1
    second = after_crash.publish(candidate, round_id="r0001", now=NOW)
    assert second.release_version == 2
    assert box.take(after_crash.offer(second, message_id=ID)) == 2


@pytest.mark.parametrize("write", range(9))
def test_killed_init_is_completed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    made = make_hub_files(tmp_path / "hub")
    written: list[str] = []

    def write_then_die(path: Path, content: bytes, *, mode: int = 0o644) -> None:
        if len(written) == write:
            raise Killed
        written.append(path.name)
        files.write_durably(path, content, mode=mode)

    with monkeypatch.context() as patched:
        patched.setattr(releases, "write_durably", write_then_die)
        with pytest.raises(Killed):
            releases.init(made.config, SHIPPED, now=NOW)
    releases.init(made.config, SHIPPED, now=NOW)
    repository = Repository(made.config.paths)
    (first,) = repository.listed()
    assert BoxTwin(tmp_path / "box", made.config).take(repository.offer(first, message_id=ID)) == 1
    assert rows(made) == [(1, None)]
    made.database.close()


def test_root_key_may_go_offline_after_init(hub: HubFiles, box: BoxTwin, candidate: Path) -> None:
    root_folder = hub.config.paths.data_dir / "keys" / "root"
    assert [path.name for path in root_folder.iterdir()] == ["root.key"]
    assert (root_folder / "root.key").stat().st_mode & 0o777 == 0o600
    shutil.rmtree(root_folder)
    repository = Repository(hub.config.paths)
    second = repository.publish(candidate, round_id="r0001", now=NOW)
    assert repository.refresh(NOW + 20 * DAY)
    assert box.take(repository.offer(second, message_id=ID)) == 2


@pytest.mark.parametrize(
    ("days", "renewed"),
    [(0, set()), (3, set()), (4, {"timestamp"}), (16, {"snapshot", "timestamp"}), (200, {"targets", "snapshot", "timestamp"})],
)  # fmt: skip
def test_refresh_signs_what_is_past_half_of_its_life(hub: HubFiles, days: int, renewed: set[str]) -> None:
    repository = Repository(hub.config.paths)
    chain = {metadata.signed.type: metadata.signed.version for metadata in repository._current()}
    assert repository.refresh(NOW + days * DAY) is bool(renewed)
    after = {metadata.signed.type: metadata.signed.version for metadata in repository._current()}
    assert {role for role in after if after[role] > chain[role]} == renewed
    assert repository.refresh(NOW + days * DAY) is False


def test_hub_that_was_off_for_a_year_is_fresh_again_after_one_refresh(hub: HubFiles, box: BoxTwin) -> None:
    repository = Repository(hub.config.paths)
    (first,) = repository.listed()
    timestamp = Metadata[Timestamp].from_bytes((hub.config.paths.releases / "timestamp.json").read_bytes())
    assert timestamp.signed.is_expired(datetime.fromtimestamp(NOW + 400 * DAY, UTC))
    repository.refresh(NOW + 400 * DAY)
    assert not any(m.signed.is_expired(datetime.fromtimestamp(NOW + 400 * DAY, UTC)) for m in repository._current())
    assert box.take(repository.offer(first, message_id=ID)) == 1


def test_box_goes_on_accepting_from_a_hub_that_was_restored_from_a_backup(
    hub: HubFiles, box: BoxTwin, candidate: Path, tmp_path: Path
) -> None:
    folder = hub.config.paths.releases
    shutil.copytree(folder, tmp_path / "backup")
    for n in (1, 2):
        lost = another_bundle(tmp_path / "lost.bundle", f"lost-{n}")
        release = Repository(hub.config.paths).publish(lost, round_id="", now=NOW + n * DAY)
    box.take(Repository(hub.config.paths).offer(release, message_id=ID))
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "backup", folder)
    restored = Repository(hub.config.paths)
    restored.renew(NOW + 3 * DAY)
    (first,) = restored.listed()
    assert box.take(restored.offer(first, message_id=ID)) == 1
    second = restored.publish(candidate, round_id="r0001", now=NOW + 3 * DAY)
    assert box.take(restored.offer(second, message_id=ID)) == 2


def test_version_goes_on_rising_when_the_clock_goes_back(hub: HubFiles, box: BoxTwin, candidate: Path) -> None:
    repository = Repository(hub.config.paths)
    (first,) = repository.listed()
    box.take(repository.offer(first, message_id=ID))
    second = repository.publish(candidate, round_id="r0001", now=NOW - DAY)
    assert box.take(repository.offer(second, message_id=ID)) == 2


def test_start_leaves_no_metadata_behind_that_nothing_leads_to(hub: HubFiles, box: BoxTwin) -> None:
    repository = Repository(hub.config.paths)
    for n in range(3):
        repository.renew(NOW + n)
    names = [path.name.split(".", 1)[1] for path in hub.config.paths.releases.glob("*.json")]
    assert sorted(names) == ["json", "root.json", "snapshot.json", "targets.json"]
    (first,) = repository.listed()
    assert box.take(repository.offer(first, message_id=ID)) == 1


def test_release_of_a_round_that_a_restored_database_does_not_know_is_listed_without_it(
    hub: HubFiles, candidate: Path
) -> None:
    release = Repository(hub.config.paths).publish(candidate, round_id="r0007-0a1b2c3d", now=NOW)
    with hub.database.writing() as session:
        releases.add_row(session, release, now=NOW)
    assert rows(hub) == [(1, None), (2, None)]


def test_metadata_stays_small_and_numbers_go_on_rising(
    hub: HubFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "LISTED_MAX", 2)
    repository = Repository(hub.config.paths)
    for n in range(3):
        repository.publish(another_bundle(tmp_path / f"{n}.bundle", f"v{n}"), round_id="", now=NOW)
    assert [release.release_version for release in repository.listed()] == [3, 4]


def test_what_is_no_bundle_is_not_released(hub: HubFiles, tmp_path: Path) -> None:
    bad = tmp_path / "bad.bundle"
    bad.write_bytes(SHIPPED.read_bytes() + b"x")
    with pytest.raises(SiteError, match="not released"):
        Repository(hub.config.paths).publish(bad, round_id="", now=NOW)
    assert rows(hub) == [(1, None)]


def test_damaged_folder_is_named_with_advice(hub: HubFiles) -> None:
    repository = Repository(hub.config.paths)
    (first,) = repository.listed()
    (hub.config.paths.releases / f"{first.bundle_digest}.bundle").write_bytes(b"rotten")
    with pytest.raises(SiteError, match="of a release is lost") as lost:
        repository.bundle_path(first.bundle_digest)
    assert "backup" in lost.value.advice
    (hub.config.paths.releases / "timestamp.json").write_text("{}")
    with pytest.raises(SiteError, match="metadata is damaged"):
        repository.refresh(NOW)


def test_forged_or_rolled_back_offer_is_refused_by_a_box(
    hub: HubFiles, box: BoxTwin, candidate: Path, tmp_path: Path
) -> None:
    repository = Repository(hub.config.paths)
    (first,) = repository.listed()
    old = repository.offer(first, message_id=ID)
    second = repository.publish(candidate, round_id="r0001", now=NOW)
    offer = repository.offer(second, message_id=ID)
    box.take(offer)
    with pytest.raises(exceptions.RepositoryError):
        BoxTwin(tmp_path / "fresh", hub.config).take(msgspec.structs.replace(offer, targets=old.targets))
    forged = offer.targets.replace(b'"release_version":2', b'"release_version":9')
    assert forged != offer.targets
    with pytest.raises(exceptions.RepositoryError):
        BoxTwin(tmp_path / "other", hub.config).take(msgspec.structs.replace(offer, targets=forged))
