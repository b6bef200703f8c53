"""The learning thread: new verdicts become examples, rounds in state `training` become sealed updates.

Reads reviews and rounds; writes examples, updates/ in data_dir and the round's next state.
Never talks to the hub: the hand-over to the link is the row.
Source: ARCHITECTURE.md, "Five paths": a correction becomes knowledge.
"""

import logging
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event as StopEvent

from edge_agent import bundles, database, learn, ledger, policy, privacy, replay, update
from edge_agent.bundles import ActiveBundle
from edge_agent.config import Config
from edge_agent.database import transaction
from edge_agent.evaluation import MAX_HELDOUT
from edge_agent.identity import Enrolled
from edge_agent.ledger import Outcome, Round
from edge_agent.masking import Part
from edge_agent.rounds import Event, State
from fleet_link import pki
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.files import write_durably
from models.bundle import Bundle, read_bundle
from models.errors import BundleError

log = logging.getLogger(__name__)

POLL_S = 1.0
RETRY_S = 60.0  # after the disk refused
COLLECTING = "learning from verdicts"  # name of its alarm


class Learner:
    def __init__(
        self,
        config: Config,
        holder: ActiveBundle,
        enrolled: Enrolled | None,
        clock: Callable[[], float],
        wake: StopEvent | None = None,
    ) -> None:
        """`enrolled` is None on a box that is not enrolled: it collects examples and has no rounds. `wake` is set by
        whoever has made work: the work itself is a row, so that a missed call costs POLL_S and no more.
        """
        self._config = config
        self._holder = holder
        self._enrolled = enrolled
        self._clock = clock
        self._wake = wake or StopEvent()
        self._data_dir = config.box.data_dir
        self._collected_up_to = 0
        self._collect_at = 0.0
        self._retry_at: dict[str, float] = {}  # by round

    def run(self, stop: StopEvent) -> None:
        db = database.connect(self._data_dir)
        self.repair(db)
        while not stop.is_set():
            self._wake.clear()
            self.step(db, stop)
            self._wake.wait(POLL_S)
        db.close()

    def repair(self, db: sqlite3.Connection) -> None:
        """What a killed box left: half-trained folders and sealed files without a row. `training` is simply run again."""
        shutil.rmtree(self._data_dir / "learning", ignore_errors=True)
        ledger.remove_stray_updates(db, self._data_dir)
        ledger.end_stray_alarms(db)

    def step(self, db: sqlite3.Connection, stop: StopEvent) -> None:
        self._collect(db)
        if self._enrolled is None or policy.minutes_to_open(
            self._config.policy.hours, policy.local_minute(self._clock())
        ):
            return
        for open_round in reversed(ledger.in_states(db, State.TRAINING)):
            if not stop.is_set() and time.monotonic() >= self._retry_at.get(open_round.round_id, 0.0):
                self._work_on(db, open_round, self._enrolled.identity, stop)

    def _collect(self, db: sqlite3.Connection) -> None:
        newest = int(db.execute("SELECT COALESCE(MAX(review_no), 0) FROM reviews").fetchone()[0])
        if newest <= self._collected_up_to or time.monotonic() < self._collect_at:
            return
        manifest = self._holder.current.reader.bundle.manifest
        try:
            learn.collect(db, self._data_dir, manifest, self._config.learning.heldout_fraction)
        except SiteError as error:
            self._collect_at = time.monotonic() + RETRY_S
            ledger.hold_up(db, COLLECTING, error, self._clock())
            return
        database.end_alarm(db, COLLECTING)
        self._collected_up_to = newest

    def _work_on(self, db: sqlite3.Connection, of: Round, identity: pki.Identity, stop: StopEvent) -> None:
        def stopped() -> bool:
            now = ledger.find(db, of.round_id)
            return stop.is_set() or now is None or now.state is not State.TRAINING

        folder = self._data_dir / "learning" / of.round_id
        try:
            outcome = self._train_and_seal(db, of, identity, folder, stopped)
        except learn.TrainingStoppedError:
            log.info("round %s: training stopped", of.round_id)
            return
        except (learn.CannotTrainError, LinkError, TrustError, BundleError) as error:
            log.warning("round %s: %s", of.round_id, error)
            ledger.apply(db, self._data_dir, of.round_id, Event.FAILED, self._clock(), Outcome(reason=str(error)))
            return
        except (SiteError, OSError) as error:  # the round stays in `training`, until its deadline
            self._retry_at[of.round_id] = time.monotonic() + RETRY_S
            self._hold_up(db, of.round_id, _of_site(error))
            return
        state = ledger.apply(db, self._data_dir, of.round_id, Event.SEALED, self._clock(), outcome)
        if state is not State.UPLOADING and outcome.update_path:  # the round ended meanwhile
            (self._data_dir / outcome.update_path).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _hold_up(self, db: sqlite3.Connection, round_id: str, error: SiteError) -> None:
        """The alarm of a round ends with its state: one that was closed meanwhile must not get any."""
        with transaction(db):
            now = ledger.find(db, round_id)
            if now is not None and now.state is State.TRAINING:
                ledger.hold_up(db, ledger.work_name(round_id), error, self._clock())

    def _train_and_seal(
        self,
        db: sqlite3.Connection,
        of: Round,
        identity: pki.Identity,
        folder: Path,
        stopped: Callable[[], bool],
    ) -> Outcome:
        settings = self._config
        base_path = bundles.base_file(db, self._data_dir, of.plan.base_digest)
        if base_path is None:
            raise learn.CannotTrainError("the round's base bundle is no longer on this box")
        base = read_bundle(base_path)
        if not base.manifest.is_trainable:
            raise learn.CannotTrainError(f"the round's base {base.manifest.name} is an imported network: not trainable")
        if of.plan.noise and (against := self._against_budget(db, of)):
            raise learn.CannotTrainError(against)
        needed = max(settings.policy.min_examples, of.plan.min_examples)
        chosen = self._chosen(db, of, base, needed)
        examples = learn.lay_out(db, self._data_dir, base, chosen, folder)
        if examples < needed:
            raise learn.CannotTrainError(
                f"{examples} reviewed examples can be used with the base bundle, needs {needed}"
            )
        log.info("round %s: training on %d examples", of.round_id, examples)
        trained = learn.train(of.plan, base, folder, settings.learning, stopped)
        _judge(of, trained.report, folder)
        if of.plan.kind == "masked":
            words = update.to_words(base.weights, trained.weights, of.plan, examples)
            sealed = update.build_masked(words, of.plan, identity, examples, _part(db, of))
        else:
            sealed = update.build(base.weights, trained.weights, of.plan, identity, examples)
        log.info("round %s: delta norm %.3g", of.round_id, sealed.norm_before_clip)
        path = f"updates/{of.round_id}.sealed"
        write_durably(self._data_dir / path, sealed.sealed)
        replay.keep_learned(db, of.round_id, [example for example in chosen if example.split == "train"])
        return Outcome(
            examples=examples,
            reason=replay.NOT_COUNTED,
            update_path=path,
            update=ledger.offer_of(self._data_dir / path, of.round_id, identity.name),
            part=sealed.part,
        )

    def _against_budget(self, db: sqlite3.Connection, of: Round) -> str:
        """The site may have lowered its budget since it joined."""
        return policy.against_budget(self._config.policy, privacy.spent(db), privacy.pledged_for(db, of.round_id))

    def _chosen(self, db: sqlite3.Connection, of: Round, base: Bundle, needed: int) -> list[learn.Example]:
        """To train on, and the newest held-out ones. Together never fewer than the round needs."""
        tasks = self._config.policy.tasks
        training = learn.usable(db, self._data_dir, base, tasks, "train")
        heldout = sorted(
            learn.usable(db, self._data_dir, base, tasks, "heldout"), key=lambda example: example.review_no
        )
        learned = replay.learned_up_to(db)
        new = sum(replay.is_new(example, learned) for example in training)
        older_max = max(self._config.learning.replay_max, needed - new)
        taught = replay.choose(training, learned, older_max, of.plan.seed)
        return taught + heldout[-MAX_HELDOUT:]


def _part(db: sqlite3.Connection, of: Round) -> Part:
    """Raises CannotTrainError where it is damaged, or the round was closed a moment ago."""
    try:
        part = ledger.part_of(db, of.round_id)
    except SiteError as error:
        raise learn.CannotTrainError(str(error), advice=error.advice) from error
    if part is None:
        raise learn.CannotTrainError("this box has no part in the round any more")
    return part


def _judge(of: Round, report: learn.Report, folder: Path) -> None:
    """Raises CannotTrainError where the trained weights read this site's held-out reviews clearly worse; they are dropped."""
    judged = str(report.evaluation) if report.heldout else "there is none to judge by"
    log.info("round %s: trained in %.1f s; of the held-out reviews: %s", of.round_id, report.seconds, judged)
    if report.evaluation.is_clearly_worse:
        shutil.rmtree(folder, ignore_errors=True)
        raise learn.CannotTrainError(f"not sent, clearly worse on this site's held-out reviews: {judged}")


def _of_site(error: SiteError | OSError) -> SiteError:
    if isinstance(error, SiteError):
        return error
    return SiteError(f"the disk refuses: {error.strerror or error}", advice="free some space, check rights and disk")
