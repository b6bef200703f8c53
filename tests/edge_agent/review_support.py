"""A box as the review page finds it: phantoms as DICOM files, catalog rows, results with heatmaps, a user.

Writes only under the folder it is given, through the box's own code wherever it has some.
Never asserts; tests do.
"""

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import uvicorn

from edge_agent import catalog, config, findings, instances, users
from edge_agent.database import connect
from edge_agent.findings import Findings, LabelProbability
from edge_agent.review import create_app
from models import phantom_dicom, phantoms
from models.spec import Code

REVIEWER, PASSWORD = "Dr. Ada", "correct horse battery"
T0 = 1_764_000_000.0
CODES = {
    "normal": ("17621005", "Normal"),
    "nodule": ("27925004", "Nodule"),
    "consolidation": ("9656002", "Consolidation"),
    "emphysema": ("87433001", "Pulmonary emphysema"),
    "neoplasm": ("108369006", "Neoplasm"),
    "haemorrhage": ("50960005", "Haemorrhage"),
}


@dataclass
class ReviewBox:
    config: config.Config
    db: sqlite3.Connection

    @property
    def data_dir(self) -> Path:
        return self.config.box.data_dir

    def receive(self, phantom: phantoms.Phantom, patient_seed: int, at: float, *, study: int = 1) -> int:
        """The phantom's files, kept and cataloged; gives series_no."""
        series_no = 0
        for path in phantom_dicom.write_series(phantom, self.data_dir / "sent", patient_seed=patient_seed, study=study):
            series_no = self.receive_file(path, at)
        catalog.association_ended(self.db, {catalog.SeriesNo(series_no): at})
        return series_no

    def receive_file(self, path: Path, at: float) -> int:
        kept = instances.keep(self.data_dir, [path.read_bytes()], min_free_bytes=0)
        admission = catalog.add_instance(self.db, instances.read_file_header(path), kept, calling_ae="CT1", now=at)
        return int(admission.series_no or 0)

    def read(
        self, phantom: phantoms.Phantom, series_no: int, probabilities: dict[str, float], *, reason: str = "", at: float
    ) -> int:
        """A result of the next version, its heatmap where the phantom's lesion is; gives result_no."""
        found = make_findings(phantom, probabilities, reason)
        row = catalog.next_due(self.db, at, quiet_time_s=0.0) or catalog.series(self.db, series_no)
        maps_path = f"maps/{series_no}-{row.version + 1}.npz"
        (self.data_dir / "maps").mkdir(exist_ok=True)
        findings.write_maps(found, self.data_dir / maps_path)
        version = catalog.mark_read(self.db, row)
        result_no = self.db.execute(
            "INSERT INTO results(series_no, version, bundle_digest, release_version, provider, findings, maps_path,"
            " abstained, last_instance_at, read_at) VALUES (?, ?, ?, 3, ?, ?, ?, ?, ?, ?)",
            (
                series_no, version, found.bundle_digest, found.provider, findings.to_json(found), maps_path,
                found.abstained, row.last_instance_at, at,
            ),
        ).lastrowid  # fmt: skip
        catalog.mark_reported(self.db, series_no)
        return int(result_no or 0)

    def deliver(self, result_no: int, kind: str, state: str, *, error: str = "") -> None:
        self.db.execute(
            "INSERT INTO outbox(result_no, kind, SOPInstanceUID, path, state, attempts, next_try_at, last_error)"
            " VALUES (?, ?, ?, 'x.dcm', ?, 1, 0, ?)",
            (result_no, kind, f"1.2.{result_no}.{kind == 'SR'}", state, error),
        )


def make_findings(phantom: phantoms.Phantom, probabilities: dict[str, float], reason: str = "") -> Findings:
    labels = tuple(
        LabelProbability(name, Code(CODES[name][0], "SCT", CODES[name][1]), p, name != "normal")
        for name, p in probabilities.items()
    )
    lesion_ZYX = phantom.lesion_ZYX[:, ::2, ::2].astype(np.float32)
    area_Z = lesion_ZYX.sum(axis=(1, 2)) + 1.0
    predicted = max(probabilities, key=probabilities.__getitem__)
    return Findings(
        task="chest", modality=phantom.volume.modality, labels=labels, predicted=predicted,
        prediction_set=tuple(name for name, p in probabilities.items() if p > 0.2),
        abstained=bool(reason), abstain_reason=reason, ood=1.25,
        map_label=max((n for n in probabilities if n != "normal"), key=probabilities.__getitem__),
        bundle_digest="ab" * 32, bundle_name="phantom-tiny", bundle_version="1.0.0",
        provider="CPUExecutionProvider", read_at=T0, map_SHW=lesion_ZYX,
        slice_weights_S=(area_Z / area_Z.sum()).astype(np.float32),
        source_index_S=np.arange(len(lesion_ZYX), dtype=np.int64),
    )  # fmt: skip


def make_box(data_dir: Path, **review: object) -> ReviewBox:
    loaded = config.parse({"box": {"data_dir": str(data_dir), "site": "North"}}, folder=data_dir)
    db = connect(data_dir)
    db.execute("INSERT OR IGNORE INTO users VALUES (?, ?, ?)", (REVIEWER, _record(), T0))
    return ReviewBox(replace(loaded, review=replace(loaded.review, port=0, **review)), db)  # type: ignore[arg-type]


@cache
def _record() -> str:
    """One scrypt for all tests of a run: it is slow on purpose."""
    return users.password_record(PASSWORD)


@contextmanager
def sign_in(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60.0) as browser:
        answer = browser.post("/login", data={"name": REVIEWER, "password": PASSWORD})
        if answer.status_code != 303:
            raise RuntimeError(f"login answered {answer.status_code}")
        yield browser


@contextmanager
def served(box: ReviewBox) -> Iterator[str]:
    """The page on a free port, by uvicorn in a thread."""
    door = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(box.config), log_level="warning", server_header=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        door.close()


class _HiddenFields(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "input" and values.get("type") == "hidden":
            self.fields[str(values["name"])] = values.get("value") or ""


def hidden_fields(html: str) -> dict[str, str]:
    parser = _HiddenFields()
    parser.feed(html)
    return parser.fields


def form_of(client: httpx.Client, series_no: int) -> dict[str, str]:
    told = json.loads(client.get(f"/api/series/{series_no}").content)
    return {"csrf": told["csrf"], "result_no": str(told["result_no"])}
