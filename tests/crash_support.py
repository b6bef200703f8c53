"""A box or a hub that dies at a chosen call (tests/crash.py), as a Daemon of benchmarks.house."""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import studies
from benchmarks.house import Box, House, Hub
from benchmarks.processes import Daemon, wait_for
from benchmarks.studies import Order, Reviewer

DEATH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Point:
    """Where to die: before or after the nth call of module:name; of those that have `given` among their arguments."""

    when: str
    target: str
    nth: int = 1
    given: str = ""

    def __str__(self) -> str:
        return f"{self.when}-{self.target}-{self.nth}" + (f"-{self.given}" if self.given else "")


def dying_box(box: Box, point: Point) -> Daemon:
    return dying(point, ["edge-agent", "run", "--config", str(box.config_path)], box.daemon.log_path)


def dying_hub(hub: Hub, point: Point) -> Daemon:
    return dying(point, ["hub", "run", "--config", str(hub.data_dir / "hub.toml")], hub.daemon.log_path)


def dying(point: Point, command: list[str], log_path: Path) -> Daemon:
    crash = [sys.executable, "-m", "tests.crash", point.when, point.target, str(point.nth), point.given, "--"]
    return Daemon([*crash, *command], log_path)


def plain_words(house: House, box: Box) -> list[str]:
    """A box that keeps its words as they are before the masks: what follows `-m tests.plain_words`, or its name to `dying`."""
    return [str(words_path(house)), "edge-agent", "run", "--config", str(box.config_path)]


def words_path(house: House) -> Path:
    return house.folder / "words.npy"


def dying_with_words(house: House, box: Box, point: Point) -> Daemon:
    return dying(point, ["plain-words", *plain_words(house, box)], box.daemon.log_path)


def hurry_hub(house: House) -> None:
    """It waits longer for a box that was killed, and says sooner again what that box has not heard."""
    path = house.hub.data_dir / "hub.toml"
    text = path.read_text()
    for before, after in (("stage_s = 60 ", "stage_s = 300"), ("resend_s = 5.0", "resend_s = 1.0")):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text)


@contextmanager
def taught_house(folder: Path, settings: Mapping[str, object]) -> Iterator[House]:
    """A hub and one box that has eight reviewed X-rays."""
    with House(folder) as house:
        house.open_hub("north")
        box = house.add_box("north-1", "north", dict(settings))
        house.enroll(box)
        box.add_user("reader", "phantoms-only")
        box.start()
        box.wait_ready()
        teach(box, house.folder / "scanner", per_label=3)
        yield house


def teach(box: Box, folder: Path, per_label: int, first_seed: int = 50) -> None:
    """Send phantom X-rays and review each of them as their maker knows them."""
    sent = studies.make(Order(box, "north", ("XR",), per_label, first_seed), folder)
    studies.send_all([box], sent)
    uids = {study.SeriesInstanceUID: study for study in sent}
    read = "SELECT s.series_no, s.SeriesInstanceUID, r.findings FROM series s JOIN results r USING (series_no) WHERE s.state = 'reported'"
    examples = "SELECT 1 FROM examples"
    before = len(box.query(examples))

    def own() -> list[dict[str, Any]]:
        return [row for row in box.query(read) if row["SeriesInstanceUID"] in uids]

    wait_for("results", lambda: len(own()) == len(sent), timeout_s=60.0)
    reviewer = Reviewer(box, "reader", "phantoms-only")
    for row in own():
        reviewer.review(row["series_no"], uids[row["SeriesInstanceUID"]].label, studies.predicted(row))
    reviewer.close()
    wait_for("examples", lambda: len(box.query(examples)) == before + len(sent), timeout_s=30.0)


class Mortal:
    """One process after another in the same place: each dies at its point, the last one lives on."""

    def __init__(self, name: str, points: Sequence[Point], dying: Callable[[Point], Daemon], last: Daemon) -> None:
        self.name = name
        self._points = list(points)
        self._dying = dying
        self._last = last
        self._now = last

    def start(self) -> None:
        self._last.stop()
        self._next()

    def has_died(self) -> bool:
        """True once for each death; what comes after it then runs."""
        if self._now is self._last or self._now.running:
            return False
        assert self._now.wait_end(1.0) == -signal.SIGKILL, f"{self.waits_for}: {self._now.tail()}"
        del self._points[0]
        return True

    def revive(self) -> None:
        self._next()

    @property
    def waits_for(self) -> str:
        """The next death; "" when all are over."""
        return f"{self.name} {self._points[0]}" if self._points else ""

    def stop(self) -> None:
        self._now.stop()

    def _next(self) -> None:
        self._now = self._dying(self._points[0]) if self._points else self._last
        self._now.start()
