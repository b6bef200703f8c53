"""Rounds without a network: a hub's rounds on disk, boxes that seal real updates, an exporter without torch.

Writes into the test's own folder.
Never mocks: the exporter is a working twin of `python -m models.export` for tests that are not about torch.
"""

import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_hub import invitations, releases
from cloud_hub.collection import Vault
from cloud_hub.coordinator import Coordinator
from cloud_hub.database import Release, Round, RoundDevice
from cloud_hub.intake import Intake
from cloud_hub.ledger import plan_of
from cloud_hub.releases import Repository
from fleet_link import chunks, sealing
from fleet_link.messages import RoundAnswer, RoundPlan, TransferOffer
from fleet_link.pki import Identity, Trust, load_identity
from models import delta, round_layout
from models.bundle import SHIPPED, read_bundle
from models.drawn_delta import DrawnCodec
from tests.cloud_hub.hub_support import HubFiles, make_hub_files

Delta = dict[str, NDArray[np.float32]]

needs_bundle = pytest.mark.skipif(not SHIPPED.exists(), reason="models/bundles/phantom-tiny.bundle is not made yet")

TWIN = textwrap.dedent("""
    import argparse, json, sys
    from pathlib import Path
    import msgspec
    from safetensors import numpy as safetensors_numpy
    from models.bundle import BundleParts, read_bundle, write_bundle
    parser = argparse.ArgumentParser()
    for name in ("bundle", "weights", "name", "version", "out"):
        parser.add_argument("--" + name, required=True)
    given = parser.parse_args()
    base = read_bundle(Path(given.bundle))
    weights = safetensors_numpy.load(Path(given.weights).read_bytes())
    manifest = msgspec.structs.replace(base.manifest, name=given.name, version=given.version)
    parts = BundleParts(manifest, base.onnx, weights, base.known_inputs, base.known_outputs, base.card)
    print(json.dumps({"digest": write_bundle(Path(given.out), parts), "parity": 0.0}))
""")
TWIN_EXPORT = (sys.executable, "-c", TWIN)


def failing_export(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@dataclass
class Box:
    """What a box brings to a round."""

    name: str
    identity: Identity

    def seal(self, plan: RoundPlan, value: float, *, examples: int = 20, names: tuple[str, ...] | None = None) -> bytes:
        """An update that changes every weight that the round moves by about `value`."""
        return self.seal_delta(plan, {name: np.full(shape, value, np.float32) for name, shape in shapes(plan).items()
                                      if names is None or name in names}, examples=examples)  # fmt: skip

    def seal_delta(self, plan: RoundPlan, change: Delta, *, examples: int = 20) -> bytes:
        return self.seal_payload(plan, encoded(plan, change), examples=examples)

    def seal_payload(self, plan: RoundPlan, payload: bytes, *, examples: int = 20) -> bytes:
        return sealing.seal_update(payload, identity=self.identity, plan=plan, examples=examples)


def shapes(plan: RoundPlan) -> dict[str, tuple[int, ...]]:
    weights = read_bundle(SHIPPED).weights
    return {name: weights[name].shape for name in delta.trainable_names(weights, plan.trainable)}


def codec_of(plan: RoundPlan) -> DrawnCodec:
    """Of a round whose plan has few bits."""
    codec = round_layout.codec_of(plan, sealing.plan_digest(plan), shapes(plan))
    assert codec is not None
    return codec


def encoded(plan: RoundPlan, change: Delta) -> bytes:
    """In the plan's codec; of a share the drawn coordinates alone."""
    if (codec := round_layout.codec_of(plan, sealing.plan_digest(plan), shapes(plan))) is None:
        return delta.encode(change, seed=1)
    drawn = {name: np.where(mask, change[name], np.float32(0)) for name, mask in codec.drawn.masks().items()}
    return codec.encode(drawn, seed=1)


@dataclass
class RoundHub:
    """A hub's rounds on disk, with as many coordinators over them as the test has restarts."""

    files: HubFiles
    folder: Path
    boxes: dict[str, Box] = field(default_factory=dict)
    export_command: tuple[str, ...] = TWIN_EXPORT
    now: float = field(default_factory=time.time)
    round_id: str = ""  # of the round started last

    def __post_init__(self) -> None:
        paths = self.files.config.paths
        sealing.new_sealing_key(paths.sealing_key)
        releases.init(self.files.config, SHIPPED, now=self.now)
        self.repository = Repository(paths)
        self.trust = Trust(paths.ca_certificate.read_bytes())
        self.restart()

    def restart(self) -> None:
        """As after kill -9: nothing but the disk is left."""
        config = self.files.config
        vault = Vault(sealing.load_sealing_key(config.paths.sealing_key), self.trust, config.rounds.examples_cap)
        self.intake = Intake(config, self.files.database, self.repository, vault)
        self.coordinator = Coordinator(
            config, self.files.database, self.repository, self.intake, export_command=self.export_command
        )
        self.coordinator.start(self.now)

    def add_box(self, name: str, site: str = "north") -> Box:
        self.files.add_device(name, site)
        certificate, key = self.files.device_files(self.folder, name)
        self.boxes[name] = Box(name, load_identity(key, certificate))
        return self.boxes[name]

    def start(self, **changes: object) -> RoundPlan:
        wish: dict[str, object] = {
            "kind": "unsafe_open", "rule": "fedavg", "noise": 0.0, "share": 1.0, "trainable": "heads", "epochs": 1, "learning_rate": 0.01,
            "clip_norm": 10.0, "min_examples": 1, "min_devices": 2, "deadline_s": 3600.0, "devices": None,
            "now": self.now, **changes,
        }  # fmt: skip
        with self.files.database.writing() as session:
            self.round_id = invitations.start_round(session, self.files.config, **wish)  # type: ignore[arg-type]
        return plan_of(self.round())

    def join(self, *names: str, joins: bool = True, reason: str = "") -> None:
        for name in names:
            answer = RoundAnswer(message_id="0" * 32, round_id=self.round_id, joins=joins, examples=20, reason=reason)
            accepted, why = self.intake.answered(name, answer, self.now)
            assert accepted, why

    def offer(self, name: str, blob: bytes) -> tuple[TransferOffer, Path]:
        """The update as the transfer leaves it on the hub's disk."""
        path = self.files.config.paths.rounds / f"{name}.whole"
        path.write_bytes(blob)
        return chunks.new_offer(
            path, kind="update", subject=self.round_id, transfer_id="1" * 32, message_id="2" * 32
        ), path  # fmt: skip

    def deliver(self, name: str, blob: bytes) -> str:
        """Gives the reason of a refusal, "" when counted."""
        offer, path = self.offer(name, blob)
        return self.intake.take_update(name, offer, path, self.now)

    def tick_until(self, state: str) -> Round:
        until = time.monotonic() + 60.0
        while self.round().state != state:
            assert time.monotonic() < until, f"still {self.round().state}: {self.round().reason}"
            self.coordinator.tick(self.now)
            time.sleep(0.01)
        return self.round()

    def round(self) -> Round:
        with self.files.database.reading() as session:
            return session.get_one(Round, self.round_id)

    def member(self, name: str) -> RoundDevice:
        with self.files.database.reading() as session:
            return session.get_one(RoundDevice, (self.round_id, name))

    def release(self, version: int) -> Release | None:
        with self.files.database.reading() as session:
            return session.get(Release, version)


def make_round_hub(folder: Path, *names: str) -> RoundHub:
    hub = RoundHub(make_hub_files(folder / "hub"), folder)
    for name in names:
        hub.add_box(name)
    return hub


def change_of(hub: RoundHub, digest: str) -> Delta:
    """What a released bundle changed against the shipped one."""
    before, after = read_bundle(SHIPPED).weights, read_bundle(hub.repository.bundle_path(digest)).weights
    return {name: after[name] - before[name] for name in before}
