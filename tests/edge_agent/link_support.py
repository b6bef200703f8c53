"""A working twin of the hub, signed releases, bundles small enough to check by hand, and a box's folder.

Writes only under the folders it is given; the broker is a real Mosquitto.
Never asserts; tests do.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edge_agent import bundles, config, database, device_key, identity, ledger
from edge_agent.bundles import ActiveBundle
from edge_agent.identity import Enrolled, Folder, HubAddress
from fleet_link import bus, chunks, envelope, sealing
from fleet_link.bus import Bus
from fleet_link.messages import (
    AnyMessage,
    BundleRequest,
    Receipt,
    ReleaseOffer,
    ReleaseReport,
    RoundAnswer,
    RoundKeys,
    RoundPlan,
    Shares,
    SurvivorsSigned,
    TransferOffer,
    TransferProgress,
    TransferReceipt,
    Unmask,
)
from fleet_link.pki import Identity, Trust
from fleet_link.topics import HUB, Channel, Direction, Topic, hub_subscription
from models.bundle import BundleParts, read_bundle, write_bundle
from models.spec import Code, InputSpec, Label, Manifest, TaskSpec
from tests.fleet_link.mosquitto_support import TestAuthority, write_identity

DEVICE = "box-1"
SIZE = 16
CODE = Code("1", "99TEST", "test")


# --- bundles --------------------------------------------------------------------------------------


def write_brightness_bundle(path: Path, *, slope: float = 10.0, version: str = "1", body: int = 0) -> str:
    """A network that calls an X-ray `nodule` when it is bright (slope > 0) or when it is dark (slope < 0).

    `body`: so many weights beside the head, which it does not look at.
    """
    weights = {"head.weight": np.array([0.0, slope], np.float32), "head.bias": np.zeros(2, np.float32)}
    if body:
        weights["body.weight"] = np.zeros(body, np.float32)
    labels = (Label("normal", CODE, False), Label("nodule", CODE, True))
    manifest = Manifest(
        format=1,
        name="brightness",
        version=version,
        network="tiny",
        inputs=(InputSpec("XR", SIZE, 2, "window", window_center=500.0, window_width=1000.0),),
        tasks=(TaskSpec("xr", "XR", 0, labels),),
        ood_threshold=100.0,
        parameters=4 + body,
        opset=17,
        members={},
    )
    slices = np.full((1, 1, SIZE, SIZE), 0.5, np.float32)
    inputs = {
        "slices_BSHW": slices,
        "slice_mask_BS": np.ones((1, 1), np.bool_),
        "modality_B": np.zeros(1, np.int64),
    }
    outputs = {
        "logits_BK": np.array([[0.0, 0.5 * slope]], np.float32),
        "map_BSKhw": np.array([0.0, 0.5 * slope], np.float32).reshape(1, 1, 2, 1, 1),
        "slice_weights_BS": np.ones((1, 1), np.float32),
        "ood_B": np.zeros(1, np.float32),
    }
    graph = _brightness_graph(weights).SerializeToString()
    return write_bundle(path, BundleParts(manifest, graph, weights, inputs, outputs, f"brightness {version}"))


def _brightness_graph(weights: Mapping[str, Any]) -> onnx.ModelProto:
    constants = [
        numpy_helper.from_array(weights["head.weight"].reshape(1, 1, 2, 1, 1), "weight"),
        numpy_helper.from_array(np.array([4], np.int64), "last"),
        numpy_helper.from_array(np.array(0.0, np.float32), "zero"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["slices_BSHW"], ["mean_BS11"], axes=[2, 3], keepdims=1),
        helper.make_node("Unsqueeze", ["mean_BS11", "last"], ["mean_BS111"]),
        helper.make_node("Mul", ["mean_BS111", "weight"], ["map_BSKhw"]),
        helper.make_node("ReduceMean", ["map_BSKhw"], ["logits_BK"], axes=[1, 3, 4], keepdims=0),
        helper.make_node("Cast", ["slice_mask_BS"], ["mask_BS"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["mask_BS"], ["count"], keepdims=1),
        helper.make_node("Div", ["mask_BS", "count"], ["slice_weights_BS"]),
        helper.make_node("ReduceMean", ["slices_BSHW"], ["mean_B"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean_B", "zero"], ["ood_B"]),
    ]
    inputs = [
        helper.make_tensor_value_info("slices_BSHW", TensorProto.FLOAT, ["B", "S", "H", "W"]),
        helper.make_tensor_value_info("slice_mask_BS", TensorProto.BOOL, ["B", "S"]),
        helper.make_tensor_value_info("modality_B", TensorProto.INT64, ["B"]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits_BK", TensorProto.FLOAT, ["B", 2]),
        helper.make_tensor_value_info("map_BSKhw", TensorProto.FLOAT, ["B", "S", 2, 1, 1]),
        helper.make_tensor_value_info("slice_weights_BS", TensorProto.FLOAT, ["B", "S"]),
        helper.make_tensor_value_info("ood_B", TensorProto.FLOAT, ["B"]),
    ]
    graph = helper.make_graph(nodes, "brightness", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


# --- the box --------------------------------------------------------------------------------------


@dataclass
class Box:
    """A box's folder with its database; the daemon's threads are the test's to run."""

    config: config.Config
    shipped: Path
    enrolled: Enrolled
    holder: ActiveBundle = field(init=False)

    def __post_init__(self) -> None:
        self.data_dir = self.config.box.data_dir
        self.db = database.connect(self.data_dir)
        self.holder = bundles.load_active(self.db, self.config, time.time())

    def add_reviewed(self, patient: str, *, bright: bool, label: str) -> int:
        """One chest X-ray, read and reviewed."""
        path = self.data_dir / f"{patient}.dcm"
        uids = write_radiograph(path, patient, bright=bright)
        cursor = self.db.execute(
            "INSERT INTO series(StudyInstanceUID, SeriesInstanceUID, Modality, state, version, first_instance_at,"
            " last_instance_at) VALUES (?, ?, 'CR', 'reported', 1, 0, 0)",
            (uids["study"], uids["series"]),
        )
        series_no = int(cursor.lastrowid or 0)
        self.db.execute(
            "INSERT INTO instances VALUES (?, ?, ?, ?, ?, 1, '', 0)",
            (uids["instance"], series_no, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, path.name),
        )
        self.db.execute(
            "INSERT INTO results VALUES (?, ?, 1, ?, 0, 'CPUExecutionProvider', '{}', '', 0, 0, 0)",
            (series_no, series_no, self.holder.current.digest),
        )
        self.review(series_no, label)
        return series_no

    def review(self, series_no: int, label: str) -> None:
        self.db.execute(
            "INSERT INTO reviews(result_no, series_no, verdict, label, reviewer, reviewed_at)"
            " VALUES (?, ?, 'accepted', ?, 'r', 0)",
            (series_no, series_no, label),
        )

    def rows(self, table: str) -> list[dict[str, Any]]:
        return [dict(row) for row in self.db.execute(f"SELECT * FROM {table}")]

    def state_of(self, round_id: str) -> str:
        found = ledger.find(self.db, round_id)
        return found.state if found else ""


def make_box(
    folder: Path, authority: TestAuthority, mqtt_port: int = 1, device: str = DEVICE, **sections: dict[str, Any]
) -> Box:
    """An enrolled box that reads with a brightness bundle."""
    data_dir = folder / "data"
    data_dir.mkdir(parents=True, exist_ok=True)
    shipped = folder / "shipped.bundle"
    if not shipped.exists():
        write_brightness_bundle(shipped)
    own: dict[str, dict[str, Any]] = {
        "box": {"data_dir": str(data_dir)},
        "dicom": {"min_free_bytes": 0},
        "inference": {"providers": ["CPUExecutionProvider"], "threads": 1, "bundle": str(shipped)},
        "policy": {"allow_unsafe_open_rounds": True, "min_examples": 2},
        "hub": {"heartbeat_s": 0.5},
    }
    for name, keys in sections.items():
        own[name] = own.get(name, {}) | keys
    parsed = config.parse(own, folder=folder)
    enrolled = enrol_offline(data_dir, authority, mqtt_port, device)
    return Box(parsed, parsed.inference.bundle or shipped, enrolled)


def enrol_offline(data_dir: Path, authority: TestAuthority, mqtt_port: int, device: str = DEVICE) -> Enrolled:
    here = identity.folder(data_dir)
    if not identity.is_enrolled(data_dir):
        here.tuf.mkdir(parents=True)
        here.ca.write_bytes(authority.pem)
        here.tuf_root.write_bytes(b"{}")
        write_identity(here.path, authority.issue(device, to_days=90))
        (here.path / f"{device}.pem").rename(here.certificate)
        (here.path / f"{device}.key").rename(here.key)
    address = HubAddress(device, "https://localhost:1", "localhost", mqtt_port)
    here.address.write_bytes(msgspec.json.encode(address))
    return identity.load(data_dir, device_key.passphrase())


def write_radiograph(path: Path, patient: str, *, bright: bool) -> dict[str, str]:
    """A CR image whose mean is far above or below the middle of the brightness bundle's window."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    ds.PatientID, ds.Modality, ds.InstanceNumber = patient, "CR", 1
    ds.Rows, ds.Columns, ds.SamplesPerPixel = 32, 32, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    middle = 850 if bright else 150
    pixels_YX = np.linspace(middle - 50, middle + 50, 32 * 32).astype(np.uint16).reshape(32, 32)
    ds.PixelData = pixels_YX.tobytes()
    ds.save_as(path, enforce_file_format=True)
    return {"study": ds.StudyInstanceUID, "series": ds.SeriesInstanceUID, "instance": ds.SOPInstanceUID}


def make_plan(base_digest: str, sealing_key: bytes, **changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "message_id": "a" * 32,
        "round_id": "round-1",
        "kind": "unsafe_open",
        "base_digest": base_digest,
        "rule": "fedavg",
        "trainable": "all",
        "clip_norm": 100.0,
        "epochs": 1,
        "learning_rate": 1e-3,
        "min_examples": 1,
        "seed": 7,
        "sealing_key": sealing_key,
        "deadline_unix_s": time.time() + 600.0,
    }
    return RoundPlan(**(fields | changes))


# --- signed releases ------------------------------------------------------------------------------


class Releases:
    """A TUF repository in memory that can also sign what no honest hub would."""

    def __init__(self) -> None:
        self.signers = {role: CryptoSigner.generate_ed25519() for role in ("root", "targets", "snapshot", "timestamp")}
        root = Root(expires=_in_days(365), consistent_snapshot=True)
        for role, signer in self.signers.items():
            root.add_key(signer.public_key, role)
        self.root = self._signed(Metadata(root), "root")
        self.version = 0
        self.targets: dict[str, TargetFile] = {}

    def offer(self, bundle: Path, release_version: int, *, days: float = 7.0, **changes: Any) -> ReleaseOffer:
        """Publish the bundle as this release and offer it."""
        content = bundle.read_bytes()
        digest = read_bundle(bundle).digest
        target = TargetFile.from_data(f"{digest}.bundle", content, ["sha256"])
        target.unrecognized_fields["custom"] = {"release_version": release_version, "round_id": ""}
        self.targets[target.path] = target
        self.version += 1
        n = self.version
        targets = Targets(version=n, expires=_in_days(365), targets=dict(self.targets))
        snapshot = Snapshot(version=n, expires=_in_days(30), meta={"targets.json": MetaFile(n)})
        timestamp = Timestamp(version=n, expires=_in_days(days), snapshot_meta=MetaFile(n))
        fields: dict[str, Any] = {
            "message_id": f"{release_version:032x}",
            "release_version": release_version,
            "bundle_digest": digest,
            "bundle_size": len(content),
            "roots": (self.root,),
            "timestamp": self._signed(Metadata(timestamp), "timestamp"),
            "snapshot": self._signed(Metadata(snapshot), "snapshot"),
            "targets": self._signed(Metadata(targets), "targets"),
        }
        return ReleaseOffer(**(fields | changes))

    def trusted_by(self, folder: Folder) -> None:
        folder.tuf_root.write_bytes(self.root)

    def _signed(self, metadata: Any, role: str) -> bytes:
        metadata.sign(self.signers[role])
        content: bytes = metadata.to_bytes()
        return content


def _in_days(days: float) -> datetime:
    return (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)


# --- the hub --------------------------------------------------------------------------------------


class HubTwin:
    """Speaks the hub's side over a real broker: receipts, updates in, bundles out. Driven by the test through `until`."""

    def __init__(self, bus_config: bus.BusConfig, hub: Identity, trust: Trust, folder: Path) -> None:
        self.identity = hub
        self.trust = trust
        self.folder = folder
        self.sealing_key = sealing.new_sealing_key(folder / "sealing.key")
        self.heard: list[AnyMessage] = []
        self.sequences: list[int] = []
        self.updates: dict[str, bytes] = {}  # by round
        self.bundles: dict[str, Path] = {}  # by digest
        self.receipts = True
        self.room = 1 << 40  # bytes of chunks it still takes; the rest is lost on the way
        self.refuse_updates = ""
        self.corrupt: Callable[[bytes], bytes] = lambda chunk: chunk
        self._sequence = envelope.Sequence(time.time, 0, lambda highest: None)
        self._incoming: dict[str, chunks.Incoming] = {}
        self._outgoing: dict[str, chunks.Outgoing] = {}
        self.bus = Bus(bus_config, [hub_subscription()])
        self.bus.start()

    def stop(self) -> None:
        self.bus.stop()

    @property
    def public_key(self) -> bytes:
        return sealing.public_bytes(self.sealing_key)

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]

    def until(self, fact: Callable[[], object], timeout_s: float = 30.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not fact():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the awaited fact did not come true; heard {self.heard[-5:]}")
            self.step()

    def step(self) -> bool:
        """Take what has come and send what is due. False when nothing came."""
        received = self.bus.receive(0.02)
        any_came = received is not None
        while received is not None:
            if received.topic.channel is Channel.CHUNK:
                self._on_chunk(received.payload)
            else:
                opened = envelope.open(received.payload, self.trust, sender=DEVICE, recipient=HUB, now=time.time())
                self.sequences.append(opened.sequence)
                self.heard.append(opened.message)
                self._on_message(opened.message)
            received = self.bus.receive(0)
        self._move_chunks()
        return any_came

    def say(self, message: AnyMessage) -> bytes:
        """Gives the bytes on the wire, so that a test can replay them."""
        sealed = envelope.seal(self.identity, DEVICE, message, sequence=self._sequence.next(), now=time.time())
        self.put(sealed)
        return sealed

    def put(self, payload: bytes, channel: Channel = Channel.MESSAGE) -> None:
        while not self.bus.publish_message(Topic(Direction.DOWN, DEVICE, channel), payload):
            time.sleep(0.02)

    def _on_message(self, message: AnyMessage) -> None:
        match message:
            case RoundAnswer() | RoundKeys() | Shares() | SurvivorsSigned() | Unmask() | ReleaseReport():
                if self.receipts:
                    self.say(Receipt(message_id=message.message_id, of=message.message_id))
            case TransferOffer():
                if message.transfer_id not in self._incoming:
                    self._incoming[message.transfer_id] = chunks.Incoming.open(self.folder, message, max_bytes=1 << 30)
            case BundleRequest():
                self._offer_bundle(message.bundle_digest)
            case TransferProgress():
                if message.transfer_id in self._outgoing:
                    self._outgoing[message.transfer_id].on_progress(message, time.monotonic())
            case TransferReceipt():
                self._outgoing.pop(message.transfer_id, None)

    def _offer_bundle(self, digest: str) -> None:
        transfer_id = digest[:32]
        path = self.bundles[digest]
        offer = chunks.new_offer(path, kind="bundle", subject=digest, transfer_id=transfer_id, message_id=transfer_id)
        if transfer_id not in self._outgoing:
            self._outgoing[transfer_id] = chunks.Outgoing(path, msgspec.structs.replace(offer, sha256=digest))

    def _on_chunk(self, chunk: bytes) -> None:
        transfer_id = chunks.parse_frame(chunk)[0]
        if transfer_id in self._incoming and self.room > 0:
            self._incoming[transfer_id].on_chunk(chunk)
            self.room -= len(chunk)

    def _move_chunks(self) -> None:
        now = time.monotonic()
        for transfer_id, incoming in list(self._incoming.items()):
            if incoming.complete:
                del self._incoming[transfer_id]
                self.updates[incoming.offer.subject] = incoming.finish().read_bytes()
                accepted = not self.refuse_updates
                self.say(TransferReceipt(
                    message_id=transfer_id, transfer_id=transfer_id, accepted=accepted, reason=self.refuse_updates
                ))  # fmt: skip
            elif incoming.progress_due(now):
                self.say(TransferProgress(
                    message_id=transfer_id, transfer_id=transfer_id, received_bitmap=incoming.bitmap
                ))  # fmt: skip
        for outgoing in self._outgoing.values():
            if outgoing.offer_due(now):
                self.say(outgoing.offer)
            for _, frame in outgoing.due(now):
                if not self.bus.publish_chunk(Topic(Direction.DOWN, DEVICE, Channel.CHUNK), self.corrupt(frame)):
                    break
