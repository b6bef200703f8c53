"""A round's counted updates: the files on disk, and their running sum in memory, open or masked.

Reads and writes data_dir/rounds/<round>/updates; the caller's rows say which of the files count.
Never counts a file that has no row: the sum can be rebuilt from rows and files at any time, and nothing is added twice.
Source: ARCHITECTURE.md, "Rounds": aggregation streams, memory is O(model); one masked update alone says nothing.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cloud_hub.aggregation import RunningSum
from cloud_hub.robust import RULES, Deferred, Delta
from cloud_hub.secure_sum import MaskedSum
from cloud_hub.update import MaskedOpener, MaskedUpdate, Opener, Update, open_masked, open_update
from fleet_link import files, notify
from fleet_link.errors import SiteError, TrustError, WardroundError
from fleet_link.messages import RoundPlan
from fleet_link.pki import Trust
from fleet_link.sealing import SealingKey, plan_digest
from models import delta, round_layout, weights_file
from models.errors import BundleError, DeltaError

SEALING_BYTES_MAX = 16 * 1024  # of a sealed update besides its payload: statement, signature, certificate, HPKE


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


class Reader:
    """Reads one update after the other into the same memory: fresh memory for each takes longer than reading it."""

    def __init__(self) -> None:
        self._content = bytearray()

    def read(self, path: Path) -> memoryview:
        """Until the next one is read. Raises OSError."""
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if len(self._content) < size:
                self._content = bytearray(size)
            content, end = memoryview(self._content)[:size], 0
            while count := file.readinto(content[end:]):
                end += count
        return content[:end]

    def forget(self) -> None:
        self._content = bytearray()


@dataclass(frozen=True)
class Collection:
    plan: RoundPlan
    opener: Opener
    total: RunningSum | Deferred
    counted: dict[str, Counted]  # by device: whose update is in `total`, or is half in it where adding failed
    reader: Reader

    @property
    def devices(self) -> set[str]:
        return set(self.counted)

    def open(self, path: Path, *, sender: str, now: float) -> Update:
        """Raises TrustError unless the file is a sound update of `sender` for this round."""
        return open_update(self.reader.read(path), self.opener, sender=sender, now=now)

    def add(self, row: Counted, update: Update) -> None:
        self.counted[row.device] = row
        self.total.add(update.delta, update.weight)


class MaskedCollection:
    """`add` as updates come, `sum` once at the end: what was added counts only if it is exactly what is asked for then."""

    def __init__(self, plan: RoundPlan, opener: MaskedOpener) -> None:
        self.plan = plan
        self.opener = opener
        self._reader = Reader()
        self._running: dict[int, _MaskedRunning] = {}  # by group

    @property
    def update_bytes_max(self) -> int:
        return self.opener.layout.word_count * self.plan.word_bits // 8 + SEALING_BYTES_MAX

    def open(self, path: Path, *, sender: str, now: float) -> MaskedUpdate:
        """Raises TrustError unless the file is the masked update of `sender` for this round."""
        return open_masked(self._reader.read(path), self.opener, sender=sender, now=now)

    def add(self, row: Counted, update: MaskedUpdate, group_no: int = 1) -> None:
        running = self._running.get(group_no) or _MaskedRunning(self._zero())
        self._running.pop(group_no, None)  # what fails half-way is no sum of anything
        if row.device in running.counted:
            return
        running.total.add(update.words)
        running.counted[row.device] = row
        self._running[group_no] = running

    def sum(self, counted: Iterable[Counted], group_no: int = 1) -> MaskedSum:
        """Of exactly these, opened again unless they are what was added; the caller's own, to take the masks off.

        Raises LostError, and SiteError for what may be over in a moment.
        """
        wanted = {row.device: row for row in counted}
        running = self._running.pop(group_no, None)
        if running is not None and running.counted == wanted:
            self._reader.forget()  # its memory is needed next
            return running.total
        total = self._zero()
        for row in wanted.values():
            notify.watchdog()
            with _reading(row):
                total.add(self.open(row.path, sender=row.device, now=row.counted_at).words)
        self._reader.forget()
        return total

    def _zero(self) -> MaskedSum:
        return MaskedSum(self.opener.layout.word_count, self.plan.word_bits)


@dataclass(frozen=True)
class _MaskedRunning:
    total: MaskedSum
    counted: dict[str, Counted] = field(default_factory=dict)


def masked(plan: RoundPlan, base: Path, vault: Vault) -> MaskedCollection:
    """What opens a masked round's updates. Raises LostError, and SiteError for what may be over in a moment."""
    try:
        layout = round_layout.layout_of(plan, plan_digest(plan), _shapes(plan, base))
    except DeltaError as error:
        raise LostError(f"the round's plan fits no sum: {error}", advice=error.advice) from error
    return MaskedCollection(plan, MaskedOpener(plan, layout, vault.sealing_key, vault.trust))


def rebuild(plan: RoundPlan, base: Path, vault: Vault, counted: Iterable[Counted]) -> Collection:
    """The sum over what is counted so far. Raises LostError, and SiteError for what may be over in a moment."""
    shapes = _shapes(plan, base)
    opener = Opener(plan, shapes, vault.sealing_key, vault.trust, vault.examples_cap)
    kept: dict[str, Counted] = {}
    reader = Reader()
    total = (
        RunningSum(shapes)
        if plan.rule == "fedavg"
        else Deferred(RULES[plan.rule], shapes, lambda: _deltas(opener, kept, reader))
    )
    collection = Collection(plan, opener, total, kept, reader)
    for row in counted:
        with _reading(row):
            collection.add(row, collection.open(row.path, sender=row.device, now=row.counted_at))
    return collection


def _deltas(opener: Opener, kept: Mapping[str, Counted], reader: Reader) -> Iterator[tuple[Delta, int]]:
    """Each counted update once more, in the same order each time."""
    for _, row in sorted(kept.items()):
        notify.watchdog()
        with _reading(row):
            update = open_update(reader.read(row.path), opener, sender=row.device, now=row.counted_at)
        yield update.delta, update.weight


def _shapes(plan: RoundPlan, base: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors that the round moves."""
    try:
        shapes = weights_file.shapes(base)
    except BundleError as error:
        if files.may_be_over(error.__cause__):
            raise SiteError(str(error), advice=error.advice) from error
        raise LostError(f"the round's base cannot be read: {error}", advice=error.advice) from error
    return {name: shapes[name] for name in delta.trainable_names(shapes, plan.trainable)}


@contextmanager
def _reading(row: Counted) -> Iterator[None]:
    """As of when it was counted: its certificate may have ended since."""
    try:
        yield
    except (OSError, TrustError) as error:
        if files.may_be_over(error):
            raise SiteError(
                f"the counted update of {row.device} cannot be read now", advice="check the hub's disk and limits"
            ) from error
        raise LostError(
            f"the counted update of {row.device} cannot be read again: {error}", advice="check the hub's disk"
        ) from error
