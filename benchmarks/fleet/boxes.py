"""`python -m benchmarks.fleet.boxes FOLDER BOX…`: many boxes in one process, each with a connection and a certificate of its own.

Real: MQTT over TLS 1.3, envelopes, the durable outbox's resends, every secret, share, mask and sealed update. Made up: the
change each box brings (the same small one). Reads identities in FOLDER; writes FOLDER/PROCESS.json several times a second.
Never keeps its state on disk, unlike a box: it is not killed here.
"""

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.processes import wait_for
from edge_agent.link import RESEND_S
from fleet_link.bus import BusConfig
from fleet_link.files import write_durably
from fleet_link.messages import RoundPlan
from fleet_link.pki import Trust, load_identity
from models import addable, round_layout
from models.bundle import SHIPPED, file_digest
from tests.cloud_hub import box_twin, masked_twin
from tests.cloud_hub.box_twin import BoxTwin
from tests.cloud_hub.masked_twin import EXAMPLES, MaskedTwin

HEARTBEAT_S = 15.0  # as edge-agent.toml has it
CHANGE = 0.01  # of every weight
PAUSE_S, STATUS_S, GO_TIMEOUT_S = 0.02, 0.25, 300.0
ADDRESS, AUTHORITIES, GO = "address.json", "ca.pem", "go"


class SmallTwin(MaskedTwin):
    """All boxes of the process bring the same words, made once."""

    def encoded(self, plan: RoundPlan) -> NDArray[np.unsignedinteger]:
        return _encoded(plan).copy()


@cache
def _encoded(plan: RoundPlan) -> NDArray[np.unsignedinteger]:
    layout = masked_twin.layout_of(plan)
    change = {name: np.full(shape, CHANGE, np.float32) for name, shape in layout.shapes.items()}
    words, _ = addable.encode(change, layout, round_layout.weight_share(EXAMPLES, plan), np.random.default_rng(7))
    return words


@dataclass
class Present:
    """A box that tells the hub that it is there: on time, and at once when something has changed."""

    box: BoxTwin
    told: object = None
    told_at: float = 0.0

    def step(self, now: float) -> None:
        self.box.step()
        self.box.heard.clear()
        tells = (self.box.bus.connected, dict(self.box.round_state))
        if self.box.bus.connected and (tells != self.told or now - self.told_at >= HEARTBEAT_S):
            self.told_at = now
            self.box.heartbeat()
        self.told = tells


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    box_twin.RESEND_S = RESEND_S
    trust = Trust((folder / AUTHORITIES).read_bytes())
    host, port = json.loads((folder / ADDRESS).read_text())
    write_durably(folder / f"{names[0]}.json", json.dumps({"connected": 0, "states": {}}).encode(), mode=0o644)
    wait_for("word to begin", (folder / GO).exists, timeout_s=GO_TIMEOUT_S, every_s=0.02)
    present = [Present(_box(folder, name, trust, host, port)) for name in names]
    told_at = 0.0
    while True:
        now = time.monotonic()
        for each in present:
            each.step(now)
        if now - told_at >= STATUS_S:
            told_at = now
            _tell(folder / f"{names[0]}.json", [each.box for each in present])
        time.sleep(PAUSE_S)


def _box(folder: Path, name: str, trust: Trust, host: str, port: int) -> BoxTwin:
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    files = BusConfig(host, port, name, folder / AUTHORITIES, certificate, key)
    identity = load_identity(key, certificate)
    box = BoxTwin(identity, files, trust, folder, _base_digest())
    box.masked = SmallTwin(identity, trust)
    return box


@cache
def _base_digest() -> str:
    return file_digest(SHIPPED)


def _tell(path: Path, boxes: list[BoxTwin]) -> None:
    states = Counter(state for box in boxes for state in box.round_state.values())
    connected = sum(box.bus.connected for box in boxes)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"connected": connected, "states": states}))
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
