"""Boxes in memory (tests/cloud_hub/box_twin.py) enrolled at a hub that runs as a process of its own.

Reads and writes the test's own folder and the hub's address.
Never a real box: a round needs three, and one real one is what a test is about.
"""

import sqlite3
import time
from typing import Any

from benchmarks.house import House
from edge_agent import identity
from fleet_link.bus import BusConfig
from models.bundle import SHIPPED, file_digest
from tests.cloud_hub.box_twin import BoxTwin
from tests.cloud_hub.masked_twin import MaskedTwin

HEARTBEAT_S = 1.0


class Twins:
    """Driven by `step`, as often as the test finds the time."""

    def __init__(self, house: House, *names: str) -> None:
        self.boxes = [_enrolled(house, name) for name in names]
        self._heartbeat_at = 0.0

    def join_masked_rounds(self) -> None:
        """From now on, with a part that has seen no round yet."""
        for number, box in enumerate(self.boxes, 1):
            box.masked = MaskedTwin(box.identity, box.trust, value=0.01 * number)

    @property
    def masked(self) -> list[MaskedTwin]:
        return [box.masked for box in self.boxes if box.masked is not None]

    def step(self) -> None:
        is_due = time.monotonic() - self._heartbeat_at > HEARTBEAT_S
        if is_due:
            self._heartbeat_at = time.monotonic()
        for box in self.boxes:
            if box.bus.connected:
                box.step()
                if is_due:
                    box.heartbeat()

    def close(self) -> None:
        for box in self.boxes:
            box.close()


def hub_row(house: House, sql: str, *values: object) -> dict[str, Any]:
    """Read beside the running hub, or one that was killed."""
    db = sqlite3.connect(f"file:{house.hub.data_dir / 'hub.db'}?mode=ro", uri=True, timeout=30.0)
    db.row_factory = sqlite3.Row
    try:
        return dict(db.execute(sql, values).fetchone())
    finally:
        db.close()


def _enrolled(house: House, name: str) -> BoxTwin:
    folder = house.folder / name
    folder.mkdir()
    token = house.hub.fleet("device", "add", name, "--site", "north")["token"]
    enrolled = identity.enroll(token, folder)
    files, address = enrolled.folder, enrolled.address
    config = BusConfig(
        host=address.mqtt_host,
        port=address.mqtt_port,
        name=name,
        ca_path=files.ca,
        certificate_path=files.certificate,
        key_path=files.key,
    )
    return BoxTwin(enrolled.identity, config, enrolled.trust, folder, file_digest(SHIPPED))
