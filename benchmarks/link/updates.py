"""Sealed updates of the dummy network, written once and read again by each measurement of the hub's cost.

Writes a folder: the CA, the hub's sealing key, the plan and a few boxes' updates, as the boxes of a round make them.
Never masks against other boxes: of a masked update's masks only its own is there, so that the sum can be opened and checked.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from benchmarks.link import dummy
from cloud_hub import ca
from edge_agent import update
from fleet_link import masking, messages, sealing
from fleet_link.messages import RoundPlan
from fleet_link.pki import Identity, Trust
from fleet_link.sealing import SealingKey
from models import round_layout

Kind = Literal["unsafe_open", "masked"]

NAMES = ("box-1", "box-2", "box-3", "box-4")  # repeated where a sum has more
EXAMPLES = 8
CLIP_NORM = 10.0
_WHOLE = "plan"  # written last


@dataclass(frozen=True)
class Folder:
    """Where they lie."""

    path: Path

    def update(self, name: str) -> Path:
        return self.path / f"{name}.sealed"

    @property
    def trust(self) -> Trust:
        return Trust((self.path / "ca.pem").read_bytes())

    @property
    def sealing_key(self) -> SealingKey:
        return sealing.load_sealing_key(self.path / "sealing.key")

    @property
    def plan(self) -> RoundPlan:
        plan = messages.decode((self.path / _WHOLE).read_bytes())
        assert isinstance(plan, RoundPlan)  # `written` wrote it
        return plan


def mask_key(name: str) -> bytes:
    """The bench's, and no secret: of a masked update's one mask."""
    return name.encode().ljust(32, b".")


def written(root: Path, kind: Kind, parameters: int, boxes: int) -> Folder:
    """For a sum of `boxes` updates; what is there is kept."""
    word_bits, value_bits = round_layout.numbers_for(boxes)
    folder = Folder(root / (f"{kind}-{parameters}" + f"-{boxes}" * (kind == "masked")))
    if (folder.path / _WHOLE).exists():
        return folder
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "sealing.key").unlink(missing_ok=True)
    key, now = sealing.new_sealing_key(folder.path / "sealing.key"), time.time()
    authority = ca.create(ec.generate_private_key(ec.SECP256R1()), name="bench", now=now)
    (folder.path / "ca.pem").write_bytes(authority.pem)
    plan = _plan(kind, sealing.public_bytes(key), now)
    if kind == "masked":
        plan = msgspec.structs.replace(
            plan, word_bits=word_bits, value_bits=value_bits, boxes_max=boxes, examples_cap=EXAMPLES
        )
    for name in NAMES:
        device_key = ec.generate_private_key(ec.SECP256R1())
        certificate = authority.issue_device(device_key.public_key(), name, days=30, now=now)
        identity = Identity(name, device_key, certificate.public_bytes(Encoding.DER))
        folder.update(name).write_bytes(_sealed(plan, identity, parameters))
    unfinished = folder.path / "plan.tmp"
    unfinished.write_bytes(messages.encode(plan))
    os.replace(unfinished, folder.path / _WHOLE)
    return folder


def _plan(kind: Kind, sealing_key: bytes, now: float) -> RoundPlan:
    return RoundPlan(
        message_id="0" * 32,
        round_id="bench",
        kind=kind,
        base_digest="a" * 64,
        rule="fedavg",
        trainable="all",
        clip_norm=CLIP_NORM,
        epochs=1,
        learning_rate=0.001,
        min_examples=1,
        seed=1,
        sealing_key=sealing_key,
        deadline_unix_s=now + 86_400.0,
    )


def _sealed(plan: RoundPlan, identity: Identity, parameters: int) -> bytes:
    change = dummy.change(identity.name, plan.seed, dummy.shapes(parameters), plan.clip_norm)
    if plan.kind == "unsafe_open":
        return update.build(change, plan, identity, EXAMPLES).sealed
    words = masking.as_words(update.to_words(change, plan, EXAMPLES).words, plan.word_bits)
    masking.apply(words, [mask_key(identity.name)], [])
    return sealing.seal_update(masking.pack(words), identity=identity, plan=plan, examples=EXAMPLES)
