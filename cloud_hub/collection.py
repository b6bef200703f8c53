"""A round's counted updates: the files on disk, and their running sum in memory.

Reads and writes data_dir/rounds/<round>/updates; the caller's rows say which of the files count.
Never counts a file that has no row: the sum can be rebuilt from rows and files at any time, and nothing is added twice.
Source: ARCHITECTURE.md, "Rounds": aggregation streams, memory is O(model).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.aggregation import RunningSum
from cloud_hub.update import Opener, Update, open_update
from fleet_link.errors import SiteError, TrustError, WardroundError
from fleet_link.messages import RoundPlan
from fleet_link.pki import Trust
from fleet_link.sealing import SealingKey
from models import delta
from models.bundle import read_bundle
from models.errors import BundleError


class LostError(WardroundError):
    """The base or a counted update cannot be read again: the round cannot be finished."""


@dataclass(frozen=True)
class Vault:
    """The hub's key for updates, whom it believes, and how much one box may weigh."""

    sealing_key: SealingKey
    trust: Trust
    examples_cap: int


@dataclass(frozen=True)
class Counted:
    """A row whose update is counted."""

    device: str
    path: Path
    counted_at: float


@dataclass(frozen=True)
class Collection:
    plan: RoundPlan
    opener: Opener
    total: RunningSum
    devices: set[str]  # whose update is in `total`, or is half in it where adding failed

    def open(self, path: Path, *, sender: str, now: float) -> Update:
        """Raises TrustError unless the file is a sound update of `sender` for this round."""
        return open_update(path.read_bytes(), self.opener, sender=sender, now=now)

    def add(self, device: str, update: Update) -> None:
        self.devices.add(device)
        self.total.add(update.delta, update.weight)


def rebuild(plan: RoundPlan, base: Path, vault: Vault, counted: Iterable[Counted]) -> Collection:
    """The sum over what is counted so far. Raises LostError, and SiteError for what may be over in a moment."""
    try:
        weights = read_bundle(base).weights
    except BundleError as error:
        if _may_be_over(error.__cause__):
            raise SiteError(str(error), advice=error.advice) from error
        raise LostError(f"the round's base cannot be read: {error}", advice=error.advice) from error
    shapes = {name: weights[name].shape for name in delta.trainable_names(weights, plan.trainable)}
    opener = Opener(plan, shapes, vault.sealing_key, vault.trust, vault.examples_cap)
    collection = Collection(plan, opener, RunningSum(shapes), set())
    for row in counted:
        try:
            # As of when it was counted: its certificate may have ended since.
            collection.add(row.device, collection.open(row.path, sender=row.device, now=row.counted_at))
        except (OSError, TrustError) as error:
            if _may_be_over(error):
                raise SiteError(
                    f"the counted update of {row.device} cannot be read now", advice="check the hub's disk and limits"
                ) from error
            raise LostError(
                f"the counted update of {row.device} cannot be read again: {error}", advice="check the hub's disk"
            ) from error
    return collection


def _may_be_over(error: BaseException | None) -> bool:
    """Too many open files or a moment's trouble of the disk; a file that is not there is lost."""
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
