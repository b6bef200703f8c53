"""A hub's link over a real Mosquitto with mutual TLS, driven step by step by the test.

Writes into the test's own folder; starts one broker.
Never mocks: boxes are working twins.
"""

import time

from cloud_hub.broker import Broker
from cloud_hub.database import Refusal
from cloud_hub.distribution import Distribution
from cloud_hub.link import Link, Parts, open_bus
from fleet_link.bus import BusConfig
from fleet_link.pki import load_identity
from models.bundle import SHIPPED, file_digest
from tests.cloud_hub.box_twin import BoxTwin, until
from tests.cloud_hub.round_support import RoundHub


class LinkedHub:
    """Broker, link and boxes, driven step by step by the test."""

    def __init__(self, rounds: RoundHub) -> None:
        self.rounds = rounds
        self.config = rounds.files.config
        self.database = rounds.files.database
        self.broker = Broker(self.config, write_access=rounds.files.write_access, on_refused=lambda reason: None)
        self.broker.start()
        self.boxes: dict[str, BoxTwin] = {}
        self.clock_offset_s = 0.0
        self.connect()

    def connect(self) -> None:
        paths = self.config.paths
        self.bus = open_bus(self.config)
        self.bus.start()
        self.distribution = Distribution(self.config, self.database)
        identity = load_identity(paths.hub_key, paths.hub_certificate)
        self.link = Link(
            Parts(self.config, self.database, self.bus, identity, self.rounds.trust, self.rounds.intake,
                  self.distribution, self.rounds.repository, lambda: time.time() + self.clock_offset_s)
        )  # fmt: skip
        until(lambda: self.bus.connected)

    def restart(self) -> None:
        """The hub's process is killed and started again; broker and boxes live on."""
        self.bus.stop()
        self.link.close()
        self.rounds.coordinator.stop()
        self.rounds.restart()
        self.connect()

    def add(self, name: str) -> BoxTwin:
        paths = self.config.paths
        folder = self.rounds.folder
        files = BusConfig(
            host="localhost", port=self.config.broker.port, name=name, ca_path=paths.ca_certificate,
            certificate_path=folder / f"{name}.pem", key_path=folder / f"{name}.key",
        )  # fmt: skip
        identity = self.rounds.boxes[name].identity
        box = BoxTwin(identity, files, self.rounds.trust, folder, file_digest(SHIPPED))
        self.boxes[name] = box
        until(lambda: box.bus.connected)
        return box

    def step(self) -> None:
        self.rounds.now = time.time()
        self.link.step()
        self.link.tick(self.rounds.coordinator.tick(time.time()))
        for box in self.boxes.values():
            box.step()

    def until(self, condition: object) -> None:
        until(condition, self.step)  # type: ignore[arg-type]

    def refusals(self, device: str) -> list[str]:
        with self.database.reading() as session:
            return [row.reason for row in session.query(Refusal).filter_by(device=device)]

    def close(self) -> None:
        for box in self.boxes.values():
            box.close()
        self.bus.stop()
        self.link.close()
        self.rounds.coordinator.stop()
        self.broker.stop()
        self.database.close()
