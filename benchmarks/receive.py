"""C-STORE: instances a second that are taken and kept, beside DCMTK's storescp and Orthanc.

Makes CT instances of 0.5 MB; sends them with one stock storescu association over loopback to each receiver in turn.
Never compares across runs: the machine is noisy, so ratios of one run are what counts.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydicom.uid import generate_uid
from rich.table import Table

from benchmarks.house import House, storescu
from benchmarks.orthanc import Orthanc
from benchmarks.processes import Daemon, free_port, port_open, wait_for
from models.phantom_dicom import SeriesOptions, image
from models.phantoms import phantom

SIZE_PX = 512


@dataclass(frozen=True)
class Receiver:
    name: str
    port: int
    ae_title: str


def measure(*, quick: bool) -> dict[str, Any]:
    """Median over the repetitions, receivers in turn within each."""
    count, repetitions = (50, 2) if quick else (200, 5)
    folder = Path(tempfile.mkdtemp(prefix="wardround-bench-"))
    try:
        with _receivers(folder) as receivers:
            rates: dict[str, list[float]] = {receiver.name: [] for receiver in receivers}
            for repetition in range(repetitions):
                for receiver in receivers:
                    files = _instances(folder / "files", count, f"{repetition} {receiver.name}")
                    begin = time.perf_counter()
                    storescu(receiver.port, receiver.ae_title, files)
                    rates[receiver.name].append(count / (time.perf_counter() - begin))
        return {
            "instances": count,
            "bytes_each": files[0].stat().st_size,
            "repetitions": repetitions,
            "instances_per_s": {name: median(of) for name, of in rates.items()},
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(result: dict[str, Any]) -> Table:
    rates: dict[str, float] = result["instances_per_s"]
    ours = next(iter(rates.values()))
    shown = Table(title=f"C-STORE of {result['instances']} × {result['bytes_each']:,} bytes, one association")
    for column in ("receiver", "instances/s", "ours is × as fast"):
        shown.add_column(column, justify="left" if column == "receiver" else "right")
    for name, rate in rates.items():
        shown.add_row(name, f"{rate:.0f}", f"{ours / rate:.2f}")
    return shown


@contextmanager
def _receivers(folder: Path) -> Iterator[list[Receiver]]:
    """Ours first. It is told to wait for more instances, so that it receives and does not read meanwhile."""
    (folder / "storescp").mkdir(parents=True)
    port = free_port()
    storescp = Daemon(["storescp", "-od", str(folder / "storescp"), str(port)], folder / "storescp.log")
    with House(folder / "house") as house, Orthanc(folder / "orthanc") as orthanc:
        box = house.add_box(
            "bench", "bench", {"hub.enabled": False, "pacs.enabled": False, "dicom.quiet_time_s": 3600.0}
        )
        box.start()
        storescp.start()
        try:
            box.wait_ready()
            wait_for("storescp", lambda: port_open(port), timeout_s=10.0)
            yield [
                Receiver("Wardround (fsync before success)", box.dicom_port, box.ae_title),
                Receiver("DCMTK storescp 3.6.7 (no fsync)", port, "STORESCP"),
                Receiver("Orthanc 1.10.1", orthanc.dicom_port, orthanc.ae_title),
            ]
        finally:
            storescp.stop()


def _instances(folder: Path, count: int, name: str) -> list[Path]:
    """Fresh UIDs each time: a receiver that has an instance already may do less."""
    folder.mkdir(exist_ok=True)
    ds = image(phantom("CT", "normal", 1, size=SIZE_PX), 3, SeriesOptions(patient_seed=1))
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[name])
    del ds.NumberOfSeriesRelatedInstances, ds.ImagesInAcquisition
    files = []
    for number in range(count):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[name, str(number)])
        files.append(folder / f"{number}.dcm")
        ds.save_as(files[-1], enforce_file_format=True)
    return files
