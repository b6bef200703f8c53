"""The round that is on, moved along: what time and the state demand is carried out, from the sum to the release.

Reads and writes the table rounds and data_dir/rounds; runs in the hub's one loop.
Never decides a transition itself (rounds.py) and never opens an update (intake.py).
Source: ARCHITECTURE.md, "Rounds".
"""

import logging
import shutil
from pathlib import Path

from cloud_hub import candidate, ledger, masked, releases, rounds
from cloud_hub.candidate import CandidateError, Export, Order
from cloud_hub.collection import LostError
from cloud_hub.config import Config
from cloud_hub.database import Database, Round
from cloud_hub.intake import Intake
from cloud_hub.ledger import active_round
from cloud_hub.releases import Repository
from cloud_hub.rounds import Command, State
from fleet_link.files import move_durably
from models.bundle import file_digest

log = logging.getLogger(__name__)

GRACE_S = 60.0  # a hub that was away gives the boxes this long to deliver, whatever the deadline
CANDIDATE = "candidate.bundle"


class Coordinator:
    """Owned by the hub's loop. `start` once, then `tick`."""

    def __init__(
        self,
        config: Config,
        database: Database,
        repository: Repository,
        intake: Intake,
        *,
        export_command: tuple[str, ...] = candidate.EXPORT,
        look_s: float = 0.0,
    ) -> None:
        """`look_s`: pause between two looks at what time alone, or a revocation, makes of the round."""
        self._config = config
        self._database = database
        self._repository = repository
        self._intake = intake
        self._export_command = export_command
        self._look_s = look_s
        self._export: Export | None = None
        self._looked = ("", 0.0)  # at which round, and when
        self._last = ""  # the round that was active at the last tick
        self._told = ""  # the active round that boxes have heard of

    def start(self, now: float) -> None:
        """Repair half-done work: rows that follow published files, leftovers of exports and of finished rounds."""
        with self._database.writing() as session:
            for release in self._repository.listed():
                releases.add_row(session, release, now=now)
            active = active_round(session)
            if active is not None:
                active.deadline = max(active.deadline, now + GRACE_S)
                masked.grant(session, active.round_id, now + GRACE_S)
        for folder in self._config.paths.rounds.glob("*"):
            if active is None or folder.name != active.round_id:
                shutil.rmtree(folder, ignore_errors=True)
        if active is not None:
            candidate.clear(self._folder(active.round_id))
            log.info("round %s: goes on, %s", active.round_id, active.state)

    def tick(self, now: float) -> bool:
        """Do what time and the state demand. True when boxes should hear of it: a round began or ended."""
        active = self._active()
        if active and self._is_to_be_looked_at(active, now):
            self._intake.apply(active, rounds.Tick(), now)
        for round_id in {self._last, active} - {""}:
            self._carry_out(round_id, now)
        self._last = active  # carried out once more after its end: to be closed
        told, self._told = self._told, self._active()
        return told != self._told

    def _is_to_be_looked_at(self, active: str, now: float) -> bool:
        before, at = self._looked
        if active == before and 0.0 <= now - at < self._look_s:
            return False
        self._looked = active, now
        return True

    def stop(self) -> None:
        if self._export is not None:
            self._export.stop()

    def _active(self) -> str:
        with self._database.reading() as session:
            row = active_round(session)
        return row.round_id if row is not None else ""

    # --- commands -------------------------------------------------------------------------------------

    def _carry_out(self, round_id: str, now: float) -> None:
        with self._database.reading() as session:
            row = session.get_one(Round, round_id)
        demanded = rounds.commands(State(row.state))
        if Command.BUILD in demanded:
            self._build(row, now)
        if Command.PUBLISH in demanded:
            self._publish(round_id, now)
        if Command.CLOSE in demanded:
            self._close(round_id)

    def _build(self, row: Round, now: float) -> None:
        try:
            if self._export is None:
                self._export = self._start_export(row, now)
            bundle = self._export.poll()
            if bundle is None:
                return
        except (CandidateError, LostError) as error:
            self._export = None
            ledger.apply(self._database, row.round_id, rounds.Failed(str(error)), now)
            return
        self._export = None
        move_durably(bundle, self._folder(row.round_id) / CANDIDATE)
        candidate.clear(self._folder(row.round_id))
        digest = file_digest(self._folder(row.round_id) / CANDIDATE)
        ledger.apply(self._database, row.round_id, rounds.CandidateReady(digest), now)

    def _start_export(self, row: Round, now: float) -> Export:
        folder = self._folder(row.round_id)
        candidate.clear(folder)
        mean = self._intake.mean(row.round_id)
        base, timeout_s = self._intake.base(row.base_digest), self._config.rounds.export_timeout_s
        return Export(Order(folder, base, row.round_id, timeout_s, self._export_command), mean)

    def _publish(self, round_id: str, now: float) -> None:
        """In one transaction: the operator cannot drop the round between this look at it and the signature."""
        path = self._folder(round_id) / CANDIDATE
        with self._database.writing() as session:
            row = session.get_one(Round, round_id)
            if Command.PUBLISH not in rounds.commands(State(row.state)):
                return
            release = next((r for r in self._repository.listed() if r.bundle_digest == row.candidate_digest), None)
            if release is None and (not path.exists() or file_digest(path) != row.candidate_digest):
                ledger.advance(session, row, rounds.Failed("the candidate was lost from the hub's disk"), now)
                return
            release = release or self._repository.publish(path, round_id=round_id, now=now)
            releases.add_row(session, release, now=now)
            ledger.advance(session, row, rounds.Published(), now)

    def _close(self, round_id: str) -> None:
        """Nothing of the round's files is needed any more; what a crash leaves here goes at the next start."""
        self.stop()
        self._export = None
        self._intake.forget()
        shutil.rmtree(self._config.paths.rounds / round_id, ignore_errors=True)

    def _folder(self, round_id: str) -> Path:
        folder = self._config.paths.rounds / round_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder
