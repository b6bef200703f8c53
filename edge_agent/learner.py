"""The learning thread: new verdicts become examples, rounds in state `training` become sealed updates.

Reads reviews and rounds; writes examples, updates/ and spool/ in data_dir and the round's next state.
Never talks to the hub: the hand-over to the link is the row.
Source: ARCHITECTURE.md, "Five paths": a correction becomes knowledge.
"""

import logging
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event as StopEvent

from edge_agent import bundles, database, learn, ledger, masked, policy, privacy, replay, spool, update
from edge_agent.bundles import ActiveBundle
from edge_agent.config import Config
from edge_agent.database import transaction
from edge_agent.evaluation import MAX_HELDOUT
from edge_agent.identity import Enrolled
from edge_agent.ledger import Outcome, Round
from edge_agent.masking import Part
from edge_agent.rounds import BEFORE_SEALING, TO_WORK_ON, Event, State
from edge_agent.spool import Spooled, SpoolLostError
from fleet_link import pki
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.files import write_durably
from models import delta
from models.bundle import Bundle, read_bundle
from models.delta import Arrays
from models.errors import BundleError

log = logging.getLogger(__name__)

POLL_S = 1.0
RETRY_S = 60.0  # after the disk refused
COLLECTING = "learning from verdicts"  # name of its alarm


@dataclass(frozen=True)
class _Taught:
    change: Arrays
    examples: int
    learned: tuple[learn.Example, ...]


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
        spool.remove_strays(db, self._data_dir)

    def step(self, db: sqlite3.Connection, stop: StopEvent) -> None:
        self._collect(db)
        self._tidy_spool(db)
        if self._enrolled is None or policy.minutes_to_open(
            self._config.policy.hours, policy.local_minute(self._clock())
        ):
            return
        waiting = reversed(ledger.in_states(db, *TO_WORK_ON))
        # Late ones last: what a round that is on trains from a newer base serves them as well.
        for open_round in sorted(waiting, key=lambda known: known.state is State.LATE):
            if open_round.state is State.LATE and ledger.in_states(db, State.TRAINING):
                break  # one that is held up: what it seals would drop what comes of this
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

    def _tidy_spool(self, db: sqlite3.Connection) -> None:
        waiting, now = spool.find(db), self._clock()
        if not self._config.policy.learn:
            ledger.abandon_spool(db, self._data_dir, "this site's policy does not learn (policy.learn = false)", now)
        elif waiting is not None and now - waiting.made_at > spool.KEPT_S:
            log.info("the spooled update of round %s is thrown away: no round took it for a month", waiting.round_id)
            spool.drop(db)
        spool.remove_strays(db, self._data_dir)

    def _work_on(self, db: sqlite3.Connection, of: Round, identity: pki.Identity, stop: StopEvent) -> None:
        worked_on = BEFORE_SEALING if of.state in BEFORE_SEALING else (State.TRAINING,)

        def stopped() -> bool:
            now = ledger.find(db, of.round_id)
            if stop.is_set() or now is None or now.state not in worked_on:
                return True
            # Whoever seals now would drop what comes of this.
            return now.state is State.LATE and bool(ledger.in_states(db, State.TRAINING))

        folder = self._data_dir / "learning" / of.round_id
        try:
            event, outcome = self._made(db, of, identity, folder, stopped)
        except learn.TrainingStoppedError:
            log.info("round %s: training stopped", of.round_id)
            return
        except SpoolLostError as error:
            self._lose_spool(db, of, error)
            return
        except (learn.CannotTrainError, LinkError, TrustError, BundleError) as error:
            log.warning("round %s: %s", of.round_id, error)
            ledger.apply(db, self._data_dir, of.round_id, Event.FAILED, self._clock(), Outcome(reason=str(error)))
            return
        except (SiteError, OSError) as error:  # the round stays in `training`, until its deadline
            self._retry_at[of.round_id] = time.monotonic() + RETRY_S
            self._hold_up(db, of.round_id, _of_site(error))
            return
        state = ledger.apply(db, self._data_dir, of.round_id, event, self._clock(), outcome)
        if state is not State.UPLOADING and outcome.update_path:  # the round ended meanwhile
            (self._data_dir / outcome.update_path).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        spool.remove_strays(db, self._data_dir)
        if state is State.TRAINING:
            self._wake.set()  # prepared: to be sealed

    def _lose_spool(self, db: sqlite3.Connection, of: Round, error: SpoolLostError) -> None:
        """An open round trains again. A masked one has said its keys for this update: the next may have another."""
        log.error("round %s: %s", of.round_id, error)
        spool.drop(db)
        event = Event.LOST if of.plan.kind == "unsafe_open" else Event.FAILED
        ledger.apply(db, self._data_dir, of.round_id, event, self._clock(), Outcome(reason=str(error)))

    def _hold_up(self, db: sqlite3.Connection, round_id: str, error: SiteError) -> None:
        """The alarm of a round ends with its state: one that was closed meanwhile must not get any."""
        with transaction(db):
            now = ledger.find(db, round_id)
            if now is not None and now.state in TO_WORK_ON:
                ledger.hold_up(db, ledger.work_name(round_id), error, self._clock())

    def _made(
        self,
        db: sqlite3.Connection,
        of: Round,
        identity: pki.Identity,
        folder: Path,
        stopped: Callable[[], bool],
    ) -> tuple[Event, Outcome]:
        base = self._base(db, of)
        if of.plan.buffer and of.state is State.TRAINING:
            return Event.SEALED, self._seal_spooled(db, of, base, identity)
        if not of.plan.buffer:
            taught = self._train(db, of, base, folder, stopped)
            return Event.SEALED, self._sealed(db, of, identity, taught)
        if self._has_spooled(db, of):
            made = None
        else:
            taught = self._train(db, of, base, folder, stopped)
            made = spool.write(self._data_dir, of.plan, taught.change, (taught.examples, taught.learned), self._clock())
        return Event.PREPARED, self._prepared(of, identity, made)

    def _base(self, db: sqlite3.Connection, of: Round) -> Bundle:
        """What the site may have changed since it joined is asked again."""
        base_path = bundles.base_file(db, self._data_dir, of.plan.base_digest)
        if base_path is None:
            raise learn.CannotTrainError("the round's base bundle is no longer on this box")
        base = read_bundle(base_path)
        if not base.manifest.is_trainable:
            raise learn.CannotTrainError(f"the round's base {base.manifest.name} is an imported network: not trainable")
        if against := policy.against_weights(of.plan, self._config.policy):
            raise learn.CannotTrainError(against)
        if of.plan.noise and of.state is not State.LATE and (against := self._against_budget(db, of)):
            raise learn.CannotTrainError(against)
        return base

    def _train(
        self, db: sqlite3.Connection, of: Round, base: Bundle, folder: Path, stopped: Callable[[], bool]
    ) -> _Taught:
        settings = self._config
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
        change = update.change_of(base.weights, trained.weights, of.plan)
        return _Taught(change, examples, tuple(each for each in chosen if each.split == "train"))

    def _sealed(self, db: sqlite3.Connection, of: Round, identity: pki.Identity, taught: _Taught) -> Outcome:
        if of.plan.kind == "masked":
            words = update.to_words(taught.change, of.plan, taught.examples)
            sealed = update.build_masked(words, of.plan, identity, taught.examples, _part(db, of))
        else:
            sealed = update.build(taught.change, of.plan, identity, taught.examples)
        log.info("round %s: delta norm %.3g", of.round_id, sealed.norm_before_clip)
        path = f"updates/{of.round_id}.sealed"
        write_durably(self._data_dir / path, sealed.sealed)
        replay.keep_learned(db, of.round_id, taught.learned)
        return Outcome(
            examples=taught.examples,
            reason=replay.NOT_COUNTED,
            update_path=path,
            update=ledger.offer_of(self._data_dir / path, of.round_id, identity.name),
            part=sealed.part,
        )

    # --- buffered rounds --------------------------------------------------------------------------

    def _has_spooled(self, db: sqlite3.Connection, of: Round) -> bool:
        """What waits is taken, or makes room. Raises CannotTrainError where the site does not learn, or no more from this base."""
        waiting, now = spool.find(db), self._clock()
        if not self._config.policy.learn:
            raise learn.CannotTrainError("this site's policy does not learn (policy.learn = false)")
        if waiting is not None and of.state is State.LATE:
            return True  # for the next round; this one has nothing to ask of it
        if waiting is not None:
            against = spool.against(db, waiting, of.plan, self._config.policy, now)
            log.info("round %s: the update of round %s waits%s", of.round_id, waiting.round_id,
                     f", and is thrown away: {against}" if against else "")  # fmt: skip
            if not against:
                return True
            spool.drop(db)
        if reason := spool.against_training(db, of.plan, self._config.policy):
            raise learn.CannotTrainError(reason)
        return False

    def _prepared(self, of: Round, identity: pki.Identity, made: Spooled | None) -> Outcome:
        outcome = Outcome(spooled=made)
        if of.plan.kind == "masked" and of.state is State.PREPARING:
            part, keys = masked.begin(of.plan, identity, self._config.policy.min_cohort)
            outcome = replace(outcome, part=part, said=keys)
        return outcome

    def _seal_spooled(self, db: sqlite3.Connection, of: Round, base: Bundle, identity: pki.Identity) -> Outcome:
        """Raises SpoolLostError where the spool does not hold what the round was promised."""
        waiting = spool.find(db)
        if waiting is None:
            raise SpoolLostError("the spool is empty")
        if against := spool.against(db, waiting, of.plan, self._config.policy, self._clock()):
            raise SpoolLostError(f"what is in the spool is not for this round: {against}")
        shapes = {name: base.weights[name].shape for name in delta.trainable_names(base.weights, of.plan.trainable)}
        stale = spool.staleness(of.plan, waiting)
        change = spool.scaled(spool.load(self._data_dir, waiting, shapes), of.plan.clip_norm, stale)
        taught = _Taught(change, waiting.examples, waiting.learned)
        log.info("round %s: the update of round %s is sealed, %d releases old", of.round_id, waiting.round_id, stale)
        return replace(self._sealed(db, of, identity, taught), used=(waiting, stale))

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
