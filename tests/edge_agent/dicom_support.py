"""A real SCP in a temporary folder, and real senders: DCMTK's tools and a raw one for files that those refuse.

Writes only under the folder it is given.
Never asserts; tests do.
"""

import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.dimse_primitives import C_STORE

from edge_agent import config
from edge_agent.database import connect
from edge_agent.receive import StorageScp

SHARED_DICOM = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dicom"
AE_TITLE = "WARDROUND"


@dataclass
class RunningScp:
    port: int
    data_dir: Path
    db: sqlite3.Connection
    ended: list[float]  # one entry per ended association that brought something

    def wait_for(self, fact: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not fact():
            if time.monotonic() > deadline:
                raise TimeoutError("the awaited fact did not come true")
            time.sleep(0.01)

    def all(self, table: str) -> list[dict[str, Any]]:
        return [dict(row) for row in self.db.execute(f"SELECT * FROM {table}")]


def make_config(data_dir: Path, **dicom: Any) -> config.Config:
    loaded = config.parse({"box": {"data_dir": str(data_dir)}}, folder=data_dir)
    settings = {"bind": "127.0.0.1", "port": 0, "min_free_bytes": 0, **dicom}
    return replace(loaded, dicom=replace(loaded.dicom, **settings))


@contextmanager
def running_scp(data_dir: Path, **dicom: Any) -> Iterator[RunningScp]:
    db = connect(data_dir)
    ended: list[float] = []
    scp = StorageScp(make_config(data_dir, **dicom), lambda: ended.append(time.monotonic()))
    scp.start()
    try:
        yield RunningScp(scp.port, data_dir, db, ended)
    finally:
        scp.stop()
        db.close()


def dcmtk(tool: str, port: int, *arguments: str, called: str = AE_TITLE) -> subprocess.CompletedProcess[str]:
    """Run echoscu or storescu against the SCP; the options come before the files in `arguments`."""
    command = [tool, "-v", "-aec", called, "127.0.0.1", str(port), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def send_raw(
    port: int,
    body: bytes,
    *,
    SOPClassUID: str,
    SOPInstanceUID: str,
    TransferSyntaxUID: str,
    calling: str = "RAW",
) -> int:
    """C-STORE of bytes as they are, whatever they are. Gives the status, -1 where no answer came."""
    ae = AE(calling)
    ae.add_requested_context(SOPClassUID, TransferSyntaxUID)
    association = ae.associate("127.0.0.1", port, ae_title=AE_TITLE)
    if not association.is_established:
        raise ConnectionError("no association")
    try:
        return store_raw(association, body, SOPClassUID=SOPClassUID, SOPInstanceUID=SOPInstanceUID)
    finally:
        association.release()


def store_raw(association: Any, body: bytes, *, SOPClassUID: str, SOPInstanceUID: str) -> int:
    (context,) = [cx for cx in association.accepted_contexts if cx.abstract_syntax == SOPClassUID]
    request = C_STORE()
    request.MessageID = 1
    request.AffectedSOPClassUID = SOPClassUID
    request.AffectedSOPInstanceUID = SOPInstanceUID
    request.Priority = 2
    request.DataSet = BytesIO(body)
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.001)
    association.dimse.send_msg(request, context.context_id)
    _, answer = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    return -1 if answer is None else int(answer.Status)


def ct_slice(
    series: str, *, position: int = 0, count: int | None = None, study: str = "1.2.3", **extra: Any
) -> Dataset:
    """A small sound CT image of 32 x 32 pixels, value = row number + position."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = study, series, "CT"
    ds.PatientID, ds.PatientName, ds.StudyDate = "TEST-1", "TEST^ONE", "20240101"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.InstanceNumber = position + 1
    ds.ImagePositionPatient = [0.0, 0.0, 2.5 * position]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [0.5, 0.75]
    ds.SliceThickness = 2.5
    ds.Rows = ds.Columns = 32
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 1, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1000
    if count is not None:
        ds.NumberOfSeriesRelatedInstances = count
    rows = [(row + position).to_bytes(2, "little") * 32 for row in range(32)]
    ds.PixelData = b"".join(rows)
    for keyword, value in extra.items():
        setattr(ds, keyword, value)
    return ds


def write(ds: Dataset, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def encoded(ds: Dataset) -> bytes:
    """The data set alone, as it travels in a C-STORE."""
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    raw = buffer.getvalue()
    return raw[144 + int.from_bytes(raw[140:144], "little") :]
