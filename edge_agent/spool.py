"""The spool: one trained update that no sum has yet. It outlives its round, until a buffered one takes it.

Reads and writes the table `spool` and spool/ in data_dir (0600); gives the update clipped and scaled for one plan.
Never lets the file leave the box as it is, and no update go into two sums: its row goes in the step that seals it.
Source: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation" (FedBuff), Algorithm 1.
"""

import hashlib
import logging
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from edge_agent import learn, replay
from edge_agent.config import Policy
from edge_agent.learn import CannotTrainError, Example
from fleet_link.files import write_durably
from fleet_link.messages import RoundPlan
from models import delta
from models.delta import Arrays

log = logging.getLogger(__name__)

FOLDER = "spool"
KEPT_S = 30 * 24 * 3600.0  # no round took it for so long: the images may teach anew


TaughtBy = tuple[int, tuple[Example, ...]]


class SpoolLostError(CannotTrainError):
    """The spool does not hold what the round was promised."""


@dataclass(frozen=True)
class Spooled:
    round_id: str  # that it was trained for
    base_digest: str
    trainable: str
    examples: int  # its weight
    learned: tuple[Example, ...]  # these, and such whose images were gone
    path: str  # relative to data_dir
    sha256: str
    made_at: float
    is_shown: bool = False


# --- the row and its file -------------------------------------------------------------------------


def write(data_dir: Path, plan: RoundPlan, change: Arrays, taught_by: TaughtBy, now: float) -> Spooled:
    """The file; its row follows in the transaction that makes it count (`keep`). Raises SiteError when the disk refuses."""
    content = safetensors_numpy.save(change)
    path = f"{FOLDER}/{plan.round_id}.safetensors"
    write_durably(data_dir / path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    return Spooled(plan.round_id, plan.base_digest, plan.trainable, *taught_by, path, sha256, now)


def find(db: sqlite3.Connection) -> Spooled | None:
    row = db.execute(
        "SELECT round_id, base_digest, trainable, examples, learned, path, sha256, made_at, is_shown FROM spool"
    ).fetchone()
    if row is None:
        return None
    learned = msgspec.json.decode(row["learned"], type=tuple[Example, ...])
    return Spooled(**dict(row) | {"learned": learned, "is_shown": bool(row["is_shown"])})


def keep(db: sqlite3.Connection, made: Spooled) -> None:
    """One that is there already stays: a round may count on it."""
    db.execute(
        "INSERT OR IGNORE INTO spool (only, round_id, base_digest, trainable, examples, learned, path, sha256, made_at)"
        " VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)",
        (made.round_id, made.base_digest, made.trainable, made.examples, msgspec.json.encode(made.learned).decode(), made.path,
         made.sha256, made.made_at),
    )  # fmt: skip


def show(db: sqlite3.Connection) -> None:
    db.execute("UPDATE spool SET is_shown = 1")


def drop(db: sqlite3.Connection) -> None:
    """The file goes with the next `remove_strays`."""
    db.execute("DELETE FROM spool")


def drop_used(db: sqlite3.Connection, round_id: str) -> None:
    """What the round sealed. A later update may have taken its place: that one stays."""
    db.execute("DELETE FROM spool WHERE sha256 IN (SELECT sha256 FROM stale_updates WHERE round_id = ?)", (round_id,))


def remove_strays(db: sqlite3.Connection, data_dir: Path) -> None:
    """Files without a row: what is dropped, and what a kill left before its row was there. For the learner's thread alone."""
    kept = find(db)
    for path in (data_dir / FOLDER).glob("*"):
        if kept is None or path != data_dir / kept.path:
            path.unlink(missing_ok=True)


# --- what it is good for --------------------------------------------------------------------------


def usable(db: sqlite3.Connection, plan: RoundPlan, policy: Policy, now: float) -> Spooled | None:
    """What the round can have at once, without training."""
    waiting = find(db)
    return None if waiting is None or against(db, waiting, plan, policy, now) else waiting


def against(db: sqlite3.Connection, waiting: Spooled, plan: RoundPlan, policy: Policy, now: float) -> str:
    """Gives "" where the update may go into the round's sum, else why not."""
    needed = max(policy.min_examples, plan.min_examples)
    if waiting.base_digest not in plan.bases:
        return f"its base is none of the newest {len(plan.bases)} releases"
    if waiting.trainable != plan.trainable:
        return f"it moves {waiting.trainable}, the round {plan.trainable}"
    if now - waiting.made_at > KEPT_S:
        return "it is too old"
    if foreign := {example.modality for example in waiting.learned} - set(policy.tasks):
        return f"this site learns no more from {', '.join(sorted(foreign))} (policy.tasks)"
    if waiting.examples < needed:
        return f"it was trained on {waiting.examples} examples, needs {needed}"
    if plan.kind == "masked" and waiting.is_shown:
        return "the hub may have read it in an open round: in a masked sum it would hide nobody"
    return _against_sums(db, plan, policy, waiting.base_digest, waiting.learned)


def against_training(db: sqlite3.Connection, plan: RoundPlan, policy: Policy) -> str:
    """Gives "" where an update trained now from the round's base may go into its sum."""
    return _against_sums(db, plan, policy, plan.base_digest, learn.examples(db, policy.tasks, "train"))


def _against_sums(
    db: sqlite3.Connection, plan: RoundPlan, policy: Policy, base_digest: str, learned: Sequence[Example]
) -> str:
    """As policy.may_join: of two sums with updates of one box over one base the difference could be another's."""
    if plan.kind != "masked" or plan.noise:
        return ""
    new, needed = replay.new_since_opened(db, base_digest, learned), max(policy.min_examples, plan.min_examples)
    if new is None or new >= needed:
        return ""
    return f"{new} of its verdicts are new since a sum over its base may have been opened, needs {needed}"


def staleness(plan: RoundPlan, waiting: Spooled) -> int:
    """Releases between what the update was trained from and the round's base, as the plan lists them."""
    return plan.bases.index(waiting.base_digest)


def load(data_dir: Path, waiting: Spooled, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The change as it was trained. Raises SpoolLostError unless the file is whole and of these shapes."""
    try:
        content = (data_dir / waiting.path).read_bytes()
        change: Arrays = safetensors_numpy.load(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise SpoolLostError(f"the spooled update cannot be read: {error}", advice="check the disk") from error
    if hashlib.sha256(content).hexdigest() != waiting.sha256:
        raise SpoolLostError("the spooled update is damaged", advice="check the disk")
    if {name: value.shape for name, value in change.items()} != {name: tuple(shape) for name, shape in shapes.items()}:
        raise SpoolLostError("the spooled update has other tensors than the round's base")
    return change


def scaled(change: Arrays, clip_norm: float, staleness: int) -> Arrays:
    """Clipped first, then as FedBuff scales it: s(τ)·Δ with s(τ) = 1/√(1+τ). Its weight stays that of its examples.

    A weight would be divided out again where all updates are stale; the delta's scale makes the whole step smaller.
    """
    clipped, _ = delta.clip(change, clip_norm)
    factor = np.float32(1.0 / math.sqrt(1.0 + staleness))
    return {name: value * factor for name, value in clipped.items()}
