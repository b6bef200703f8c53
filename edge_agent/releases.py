"""Releases: verify what the hub offers, fetch it, judge it on this site's own cases, swap or refuse.

Reads ReleaseOffers, files in bundles/ and held-out examples; writes rows of `bundles` and ReleaseReports into the outbox.
Never activates what TUF metadata does not vouch for, what fails its known answers, or what is clearly worse here.
Source: The Update Framework specification 1.0, section 5 (client workflow), through tuf.ngclient.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Targets
from tuf.ngclient import FetcherInterface, Updater

from edge_agent import bundles, database, decode, instances, learn, ledger
from edge_agent.bundles import Active, ActiveBundle
from edge_agent.config import Config
from edge_agent.evaluation import MAX_HELDOUT, Evaluation
from edge_agent.identity import Folder
from edge_agent.infer import Reader
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import BundleRequest, ReleaseOffer, ReleaseReport
from models.errors import BundleError

log = logging.getLogger(__name__)

POLL_S = 1.0
RETRY_S = 60.0  # after this machine could not open a bundle
NOT_JUDGED = Evaluation()
_ANYWHERE = "https://offered.invalid/"  # the metadata comes with the offer; nothing is ever fetched


def take_offer(db: sqlite3.Connection, folder: Folder, offer: ReleaseOffer, now: float) -> BundleRequest | None:
    """Verify an offer and say what to ask the hub for. An offer may come any number of times.

    Raises TrustError (also reported to the hub) or LinkError when the metadata does not vouch for the bundle.
    """
    try:
        verify(offer, folder)
    except TrustError as error:
        bundles.report(db, _report(offer.release_version, offer.bundle_digest, "refused", str(error)), now)
        raise
    too_old = _too_old(db, offer.release_version)
    if too_old:
        log.warning("release %d: refused: %s", offer.release_version, too_old)
        bundles.report(db, _report(offer.release_version, offer.bundle_digest, "refused", too_old), now)
        return None
    row = db.execute("SELECT * FROM bundles WHERE bundle_digest = ?", (offer.bundle_digest,)).fetchone()
    state = row["state"] if row else ""
    if state == "refused":
        bundles.report(db, _report(offer.release_version, offer.bundle_digest, "refused", row["reason"]), now)
        return None
    if state == "active":
        with database.transaction(db):
            bundles.activate(db, offer.bundle_digest, offer.release_version, now)
            bundles.report(db, _report(offer.release_version, offer.bundle_digest, "activated"), now)
        return None
    if state == "fetched":
        return None
    here = state == "previous" and (folder.path.parent / row["path"]).exists()
    _keep(db, offer, "fetched" if here else "offered", now)
    log.info("release %d: %s", offer.release_version, "is still here" if here else "offered and verified")
    if here:
        return None
    return BundleRequest(
        message_id=ledger.message_id("request", offer.bundle_digest, now), bundle_digest=offer.bundle_digest
    )


def verify(offer: ReleaseOffer, folder: Folder) -> None:
    """TUF's client workflow over the offered bytes; the trusted state is kept in identity/tuf/trusted.

    Raises TrustError, or LinkError for metadata that is merely out of date.
    """
    try:
        # 1. Root chain, timestamp, snapshot and targets: signatures, thresholds, no rollback, freshness.
        updater = Updater(
            str(folder.tuf / "trusted"), _ANYWHERE, fetcher=_Offered(offer), bootstrap=folder.tuf_root.read_bytes()
        )
        updater.refresh()
        # 2. The offered digest is one that these targets name, with its size and release number.
        names = _names_of(offer)
        vouched = [target for name in names if (target := updater.get_targetinfo(name)) is not None]
    except exceptions.ExpiredMetadataError as error:
        raise LinkError(
            f"release {offer.release_version}: its metadata is out of date ({error})",
            advice="compare the clocks of box and hub; a running hub renews its metadata by itself",
        ) from error
    except (exceptions.RepositoryError, exceptions.DownloadError, ValueError) as error:
        raise _untrusted(offer, f"its metadata is not to be trusted: {error}") from error
    except OSError as error:
        raise SiteError(f"release metadata cannot be kept: {error}", advice="check free space and rights") from error
    for target in vouched:
        version = (target.custom or {}).get("release_version")
        named = (target.hashes.get("sha256"), target.length, version)
        if named == (offer.bundle_digest, offer.bundle_size, offer.release_version):
            return
    raise _untrusted(offer, "its metadata does not name the offered bundle")


def arrived(db: sqlite3.Connection, digest: str, now: float) -> None:
    """The whole file is in its place with the right digest."""
    db.execute(
        "UPDATE bundles SET state = 'fetched', changed_at = ? WHERE bundle_digest = ? AND state = 'offered'",
        (now, digest),
    )


def came_damaged(db: sqlite3.Connection, digest: str, reason: str, now: float) -> None:
    """The file that arrived is not the one that was signed. The digest is not to blame: a sound file may still come."""
    row = db.execute("SELECT * FROM bundles WHERE bundle_digest = ? AND state = 'offered'", (digest,)).fetchone()
    if row is None:
        return
    with database.transaction(db):
        db.execute("DELETE FROM bundles WHERE bundle_digest = ?", (digest,))
        bundles.report(db, _report(row["release_version"], digest, "refused", reason), now)


class Installer:
    """Takes fetched bundles into use, in a thread of its own: building an engine may take minutes."""

    def __init__(self, config: Config, holder: ActiveBundle, clock: Callable[[], float]) -> None:
        self._config = config
        self._holder = holder
        self._clock = clock
        self._retry_at: dict[str, float] = {}  # by digest

    def run(self, stop: Event) -> None:
        db = database.connect(self._config.box.data_dir)
        while not stop.is_set():
            self.step(db, stop)
            stop.wait(POLL_S)
        db.close()

    def step(self, db: sqlite3.Connection, stop: Event) -> None:
        for row in db.execute("SELECT * FROM bundles WHERE state = 'fetched' ORDER BY release_version").fetchall():
            if time.monotonic() < self._retry_at.get(row["bundle_digest"], 0.0):
                continue
            self._install(db, row, stop)
            bundles.clear_out(db, self._config.box.data_dir)

    def _install(self, db: sqlite3.Connection, row: sqlite3.Row, stop: Event) -> None:
        digest, version = row["bundle_digest"], row["release_version"]
        # 1. Not older than what came into use since it was offered.
        too_old = _too_old(db, version)
        if too_old:
            self._withdraw(db, row, too_old)
            return
        try:
            # 2. File, digest, manifest, known answer.
            reader = bundles.open_reader(self._config, self._config.box.data_dir / row["path"])
            if reader.bundle.digest != digest:
                raise BundleError("the file on disk has another digest")
        except BundleError as error:
            self._refuse(db, row, str(error), NOT_JUDGED)
            return
        except SiteError as error:
            self._retry_at[digest] = time.monotonic() + RETRY_S
            ledger.hold_up(db, bundles.release_name(version), error, self._clock())
            return
        # 3. This site's own held-out cases, before and after.
        evaluation = evaluate(db, self._config.box.data_dir, self._holder.current.reader, reader, stop)
        if evaluation is None:
            return
        if evaluation.is_clearly_worse:
            self._refuse(db, row, _worse(evaluation), evaluation)
            return
        # 4. The row first: killed here, the next start opens the new bundle.
        with database.transaction(db):
            bundles.activate(db, digest, version, self._clock())
            bundles.report(db, _report(version, digest, "activated", "", evaluation), self._clock())
        self._holder.swap(Active(reader, digest, version))
        log.info("release %d: in use (%s)", version, evaluation)

    def _refuse(self, db: sqlite3.Connection, row: sqlite3.Row, reason: str, evaluation: Evaluation) -> None:
        digest, version, now = row["bundle_digest"], row["release_version"], self._clock()
        with database.transaction(db):
            bundles.refuse(db, digest, reason, now)
            database.end_alarm(db, bundles.release_name(version))
            bundles.report(db, _report(version, digest, "refused", reason, evaluation), now)
        log.error("release %d: refused: %s", version, reason)

    def _withdraw(self, db: sqlite3.Connection, row: sqlite3.Row, reason: str) -> None:
        """The row goes: what is wrong is the release's number, and a later one may bring the same bundle."""
        digest, version, now = row["bundle_digest"], row["release_version"], self._clock()
        with database.transaction(db):
            db.execute("DELETE FROM bundles WHERE bundle_digest = ?", (digest,))
            database.end_alarm(db, bundles.release_name(version))
            bundles.report(db, _report(version, digest, "refused", reason), now)
        (self._config.box.data_dir / row["path"]).unlink(missing_ok=True)
        log.warning("release %d: refused: %s", version, reason)


def evaluate(db: sqlite3.Connection, data_dir: Path, before: Reader, after: Reader, stop: Event) -> Evaluation | None:
    """Both bundles read this site's held-out series from their images. None if stopped."""
    heldout = correct_before = correct_after = 0
    for example in learn.newest_heldout(db, MAX_HELDOUT):
        if stop.is_set():
            return None
        try:
            volume = decode.to_volume(instances.open(db, data_dir, example.series_no)).volume
            said_before, said_after = before.read(volume).predicted, after.read(volume).predicted
        except SiteError as error:
            log.info("series %d: not used to judge the release: %s", example.series_no, error)
            continue
        heldout += 1
        correct_before += said_before == example.label
        correct_after += said_after == example.label
    return Evaluation(heldout, correct_before, correct_after)


class _Offered(FetcherInterface):
    """The repository as it lies in one offer."""

    def __init__(self, offer: ReleaseOffer) -> None:
        self._by_name = {
            "timestamp.json": offer.timestamp,
            **{f"{Metadata[Root].from_bytes(root).signed.version}.root.json": root for root in offer.roots},
        }
        self._by_role = {"snapshot.json": offer.snapshot, "targets.json": offer.targets}

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix(_ANYWHERE)
        content = self._by_name.get(name, self._by_role.get(name.partition(".")[2], self._by_role.get(name)))
        if content is None:
            raise exceptions.DownloadHTTPError(f"{name} is not in the offer", 404)
        yield content


def _names_of(offer: ReleaseOffer) -> list[str]:
    """Names under which the offered targets list the digest; only the trusted set decides whether that is true."""
    targets = Metadata[Targets].from_bytes(offer.targets).signed.targets
    return [name for name, target in targets.items() if target.hashes.get("sha256") == offer.bundle_digest]


def _keep(db: sqlite3.Connection, offer: ReleaseOffer, state: str, now: float) -> None:
    db.execute(
        "INSERT INTO bundles VALUES (?, ?, ?, ?, '', ?) ON CONFLICT(bundle_digest) DO UPDATE"
        " SET state = excluded.state, release_version = excluded.release_version, changed_at = excluded.changed_at",
        (offer.bundle_digest, offer.release_version, bundles.path_of(offer.bundle_digest), state, now),
    )


def _too_old(db: sqlite3.Connection, release_version: int) -> str:
    """Why a release may not take the place of the one in use; "" if it may."""
    row = db.execute("SELECT release_version FROM bundles WHERE state = 'active'").fetchone()
    older = row is not None and release_version < row["release_version"]
    return f"older than release {row['release_version']}, which is in use" if older else ""


def _report(
    version: int, digest: str, outcome: str, reason: str = "", evaluation: Evaluation = NOT_JUDGED
) -> ReleaseReport:
    return ReleaseReport(
        message_id=ledger.message_id("release", version, digest, outcome, reason),
        release_version=version,
        bundle_digest=digest,
        outcome=outcome,  # type: ignore[arg-type]
        reason=reason[: ledger.MAX_REASON_CHARACTERS],
        heldout=evaluation.heldout,
        heldout_correct_before=evaluation.correct_before,
        heldout_correct_after=evaluation.correct_after,
    )


def _worse(evaluation: Evaluation) -> str:
    return f"clearly worse on this site's held-out cases: {evaluation}"


def _untrusted(offer: ReleaseOffer, why: str) -> TrustError:
    return TrustError(
        f"release {offer.release_version} refused: {why}",
        advice="nothing was changed on this box; ask who runs the hub whether its release keys are safe",
    )
