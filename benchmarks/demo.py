"""`./dev demo`: scanner → diagnosis → correction → sealed delta → release → box, on one machine, with every part real.

Starts the house (hub, three boxes of two hospitals, Orthanc), sends phantoms with DCMTK's storescu, reviews, learns, releases.
Never prints a figure that it did not read from the boxes, the hub or the PACS during this run.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from benchmarks import studies
from benchmarks.demo_report import Outcome, StudyRow, print_report, write_json
from benchmarks.house import Box, House, send_folder
from benchmarks.processes import HouseError, wait_for
from benchmarks.studies import Order, Reviewer, Study

REVIEWER, PASSWORD = "reader", "phantoms-only"
HEARTBEAT_TIMEOUT_S, READ_TIMEOUT_S, ROUND_TIMEOUT_S = 180.0, 300.0, 600.0
_UNREAD = "SELECT 1 FROM series WHERE state IN ('receiving', 'due', 'read')"
BOX_SETTINGS: dict[str, object] = {
    "dicom.quiet_time_s": 2.0,
    "hub.heartbeat_s": 2.0,
    "inference.threads": 1,
    "learning.threads": 1,
}


@dataclass(frozen=True)
class Place:
    """One box of the demonstration: its hospital, how that hospital's scanner looks, and what it sends."""

    name: str
    site: str
    modalities: tuple[str, ...]
    per_label: int


PLACES = (
    Place("north-1", "north", ("XR", "CT"), 4),
    Place("north-2", "north", ("MR", "XR"), 4),
    Place("south-1", "south", ("XR", "CT", "MR"), 3),
)


class Story:
    """Says what happens, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._begin = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{self.elapsed_s:6.1f} s[/dim]  {text}", highlight=False)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A spinner while it lasts, a line with its duration afterwards."""
        begin = time.monotonic()
        with self.console.status(text):
            yield
        self.say(f"{text} [green]✓[/green] [dim]{time.monotonic() - begin:.1f} s[/dim]")


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 120)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)  # a shell starts background jobs with SIGINT ignored
    folder = options.work or Path(tempfile.mkdtemp(prefix="wardround-demo-"))
    keep_folder = options.work is not None
    try:
        with House(folder) as house:
            outcome = run(house, Story(console), options)
            print_report(console, outcome)
            if options.json:
                write_json(outcome, options.json)
            _say_where(console, house, options.keep)
            if options.keep:
                signal.pause()
    except HouseError as error:
        keep_folder = True
        console.print(f"[bold red]The demonstration stopped:[/bold red] {error}", highlight=False, soft_wrap=True)
        for note in getattr(error, "__notes__", ()):
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        console.print(f"All logs are in {folder}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left running.")
        return 0 if options.keep else 130
    finally:
        if not keep_folder:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


def run(house: House, story: Story, options: argparse.Namespace) -> Outcome:
    """The whole story. Raises HouseError where a part of it does not happen."""
    with story.step(
        "Hub, PACS (Orthanc) and three boxes of two hospitals start; each box enrols with a one-time token"
    ):
        teach, exam, exam_again = open_house(house, options.seed)
    if options.dicom:
        _send_own(house, story, options.dicom)
    with story.step(
        f"DCMTK sends {len(teach) + len(exam)} studies to the boxes; they are read and the PACS has the results"
    ):
        studies.send_all(house.boxes, exam + teach)
        before = studies.wait_read(house.boxes, exam + teach, timeout_s=READ_TIMEOUT_S)
    with story.step(f"Radiologists review {len(teach)} of them (the other {len(exam)} are kept for the comparison)"):
        verdicts = review(house.boxes, teach, before)
    round_ = learn(house, story)
    with story.step("The boxes verify the release, try its known answers and swap"):
        wait_for_release(house, int(round_["release_version"]))
    with story.step(f"The same {len(exam)} images come once more, as new studies: the new model reads them"):
        studies.send_all(house.boxes, exam_again)
        after = studies.wait_read(house.boxes, exam_again, timeout_s=READ_TIMEOUT_S)
    rows = (
        _rows(teach, before, verdicts, None) + _rows(exam, before, {}, "before") + _rows(exam_again, after, {}, "after")
    )
    return Outcome(rows, round_, _memory(house), house.pacs.count_instances(), story.elapsed_s)


def open_house(house: House, seed: int) -> tuple[list[Study], list[Study], list[Study]]:
    """Start every process; meanwhile make the studies: to teach, to examine before, and the same again for after."""
    house.pacs.start()
    with ThreadPoolExecutor(4) as pool:
        adding = [pool.submit(house.add_box, place.name, place.site, BOX_SETTINGS) for place in PLACES]
        # Daemons start in this thread: they die with the thread that started them.
        house.open_hub(*dict.fromkeys(place.site for place in PLACES))
        house.boxes = boxes = [added.result() for added in adding]
        made = pool.submit(_make_studies, boxes, house.folder / "scanner", seed)
        for box, enrolled in [(box, pool.submit(_enroll, house, box)) for box in boxes]:
            enrolled.result()
            box.start()
        for box in boxes:
            box.wait_ready()
        house.pacs.wait_ready()
        wait_for("heartbeat of every box", lambda: _all_seen(house), timeout_s=HEARTBEAT_TIMEOUT_S, every_s=0.5)
        return made.result()


def review(boxes: Sequence[Box], teach: Sequence[Study], rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What a radiologist who knows the truth says of each study, by SeriesInstanceUID."""

    def review_at(box: Box) -> dict[str, str]:
        reviewer = Reviewer(box, REVIEWER, PASSWORD)
        try:
            return {
                study.SeriesInstanceUID: reviewer.review(row["series_no"], study.label, studies.predicted(row))
                for study in teach
                if study.box == box.name and (row := rows[study.SeriesInstanceUID])["result_no"] is not None
            }
        finally:
            reviewer.close()

    with ThreadPoolExecutor(len(boxes)) as pool:
        return {uid: verdict for part in pool.map(review_at, boxes) for uid, verdict in part.items()}


def learn(house: House, story: Story) -> dict[str, Any]:
    """One round: gives the hub's own account of it once it is released."""
    fleet = house.hub.fleet
    started = fleet("round", "start", "--min-devices", str(len(house.boxes)))
    round_id = started["round_id"]
    with story.step(
        f"Round {round_id}: each box fine-tunes in a child process and masks its delta; the hub opens their sum alone and signs a release"
    ):

        def ended() -> dict[str, Any] | None:
            shown: dict[str, Any] = fleet("round", "show", round_id)
            return shown if shown["state"] in ("released", "dropped") else None

        round_ = wait_for("end of the round", ended, timeout_s=ROUND_TIMEOUT_S, every_s=0.5) or {}
    if round_["state"] != "released":
        raise HouseError(f"round {round_id} was dropped: {round_['reason']}")
    return round_


def wait_for_release(house: House, release_version: int) -> None:
    def everywhere() -> bool:
        return all(
            box.query("SELECT 1 FROM bundles WHERE state = 'active' AND release_version = ?", release_version)
            for box in house.boxes
        )

    wait_for(f"release {release_version} on every box", everywhere, timeout_s=120.0, every_s=0.2)


def _enroll(house: House, box: Box) -> None:
    house.enroll(box)
    box.add_user(REVIEWER, PASSWORD)


def _make_studies(boxes: Sequence[Box], folder: Path, seed: int) -> tuple[list[Study], list[Study], list[Study]]:
    def orders(first_seed: int, copy: int) -> list[Order]:
        return [
            Order(box, place.site, place.modalities, place.per_label, first_seed + 10_000 * number, copy)
            for number, (box, place) in enumerate(zip(boxes, PLACES, strict=True))
        ]

    teach = studies.make_all(orders(seed, 1), folder / "teach")
    exam = studies.make_all(orders(seed + 5_000, 1), folder / "exam")
    again = studies.make_all(orders(seed + 5_000, 2), folder / "exam-again")
    return teach, exam, again


def _all_seen(house: House) -> bool:
    house.must_run()
    devices = house.hub.fleet("devices")
    return len(devices) == len(house.boxes) and all(device["state"] == "online" for device in devices)


def _send_own(house: House, story: Story, folder: Path) -> None:
    """The user's own files, to the last box; what became of each is listed."""
    box = house.boxes[-1]
    with story.step(f"DCMTK sends the files below {folder} to {box.name}; they are read"):
        outcomes = send_folder(box, folder)
        wait_for("an answer for each of your series", lambda: not box.query(_UNREAD), timeout_s=READ_TIMEOUT_S)
    for outcome, count in outcomes.items():
        story.say(f"[dim]files {outcome}: {count}[/dim]")
    for row in studies.results(box).values():
        story.say(f"series {row['series_no']}: {_said(row)}")
    for row in box.query("SELECT reason, count(*) AS n FROM quarantine GROUP BY reason"):
        story.say(f"set aside, {row['n']}: {row['reason']}")


def _said(row: dict[str, Any]) -> str:
    if not row["findings"]:
        return f"{row['state']}: {row['reason']}"
    return studies.predicted(row) + (" (abstained)" if row["abstained"] else "")


def _rows(
    sent: Sequence[Study], rows: dict[str, dict[str, Any]], verdicts: dict[str, str], exam: str | None
) -> list[StudyRow]:
    return [
        StudyRow.of(study, rows[study.SeriesInstanceUID], verdicts.get(study.SeriesInstanceUID, ""), exam)
        for study in sent
    ]


def _memory(house: House) -> dict[str, int]:
    return {"hub": house.hub.daemon.peak_memory_bytes(), **{b.name: b.daemon.peak_memory_bytes() for b in house.boxes}}


def _say_where(console: Console, house: House, running: bool) -> None:
    console.print("\n[bold]Where to look[/bold]" + ("" if running else "  (start with --keep, and they stay up)"))
    for box in house.boxes:
        console.print(
            f"  review page of {box.name}: {box.review_url}   user {REVIEWER}, password {PASSWORD}", highlight=False
        )
    console.print(
        f"  hub: {house.hub.url}   sign in with the token in {house.hub.data_dir / 'admin.token'}", highlight=False
    )
    console.print(f"  Orthanc: {house.pacs.http_url}/app/explorer.html", highlight=False)
    if running:
        console.print("Ctrl-C stops everything.")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./dev demo", description="Hospitals' boxes diagnose, learn and get a better model back."
    )
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C")
    parser.add_argument("--dicom", type=Path, metavar="DIR", help="send the DICOM files below DIR too")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="work in DIR and keep it (default: a folder that is removed)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--seed", type=int, default=100_000, help="first seed of the phantoms (default %(default)s)")
    options = parser.parse_args()
    if options.dicom and not options.dicom.is_dir():
        parser.error(f"{options.dicom} is not a folder")
    if options.work and options.work.exists() and any(options.work.iterdir()):
        parser.error(f"{options.work} is not empty; the demonstration wants a fresh folder")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
