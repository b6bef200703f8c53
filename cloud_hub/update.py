"""A box's sealed update becomes a delta, or masked words, that may be added: opened, decoded, limited.

Reads bytes in memory; gives arrays.
Never writes to disk, never lets one update weigh more than the plan and the hub's configuration allow.
Source: ARCHITECTURE.md, "The link"; the box's end is edge_agent/update.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fleet_link import masking, sealing
from fleet_link.errors import TrustError
from fleet_link.messages import RoundPlan
from fleet_link.pki import Trust
from fleet_link.sealing import Blob
from models import delta, round_layout
from models.addable import Layout
from models.drawn_delta import DrawnCodec
from models.errors import DeltaError

# Rounding to 8 bits raises the norm of a delta a little; a box that did not clip is far above that.
NORM_TOLERANCE = 1.25


@dataclass(frozen=True)
class Opener:
    """What is the same for all updates of one round."""

    plan: RoundPlan
    shapes: Mapping[str, tuple[int, ...]]  # of the base's trainable tensors
    sealing_key: sealing.SealingKey
    trust: Trust
    examples_cap: int

    @cached_property
    def codec(self) -> DrawnCodec | None:
        return round_layout.codec_of(self.plan, sealing.plan_digest(self.plan), self.shapes)

    def decode_clipped(self, payload: bytes) -> tuple[Mapping[str, NDArray[np.float32]], float]:
        """Within the plan's clip norm, and the norm before. Raises DeltaError on anything but exactly the base's trainable tensors."""
        if self.codec:
            return delta.clip(self.codec.decode(payload), self.plan.clip_norm)
        return delta.read(payload, self.shapes).clipped(self.plan.clip_norm)


@dataclass(frozen=True)
class Update:
    delta: Mapping[str, NDArray[np.float32]]  # norm at most the plan's clip_norm
    examples: int  # as the box says
    weight: int  # its examples, capped
    serial: str  # of the certificate it was signed with


@dataclass(frozen=True)
class MaskedOpener:
    """As Opener, for the words of a masked round."""

    plan: RoundPlan
    layout: Layout
    sealing_key: sealing.SealingKey
    trust: Trust


@dataclass(frozen=True)
class MaskedUpdate:
    words: bytes = field(repr=False)  # exactly as many as the layout says; what they say nobody can read
    examples: int  # as the box says
    serial: str


def open_masked(blob: Blob, opener: MaskedOpener, *, sender: str, now: float) -> MaskedUpdate:
    """Raises TrustError unless `blob` is what `sender` sealed for this very plan, in the plan's number of words."""
    plan, layout = opener.plan, opener.layout
    opened = sealing.open_update(
        blob, private_key=opener.sealing_key, trust=opener.trust, sender=sender, plan=plan, now=now
    )
    _check_examples(opened.examples, plan)
    masking.unpack(opened.payload, layout.word_count, plan.word_bits)
    return MaskedUpdate(opened.payload, opened.examples, opened.serial)


def open_update(blob: Blob, opener: Opener, *, sender: str, now: float) -> Update:
    """Raises TrustError unless `blob` is a sound delta that `sender` sealed for this very plan."""
    plan = opener.plan
    # 1. Certificate, signature, round and plan, sealing.
    opened = sealing.open_update(
        blob, private_key=opener.sealing_key, trust=opener.trust, sender=sender, plan=plan, now=now
    )
    # 2. Enough examples to weigh anything.
    _check_examples(opened.examples, plan)
    # 3. Exactly the base's trainable tensors, all finite. Clipped; what rounding added is taken off again.
    try:
        change, norm = opener.decode_clipped(opened.payload)
    except DeltaError as error:
        raise TrustError(str(error), advice=error.advice) from error
    # 4. By a box that did clip.
    if norm > NORM_TOLERANCE * plan.clip_norm:
        raise TrustError(f"norm {norm:.3g}, the plan's limit is {plan.clip_norm:.3g}", advice="inspect the device")
    return Update(change, opened.examples, min(opened.examples, opener.examples_cap), opened.serial)


def _check_examples(examples: int, plan: RoundPlan) -> None:
    needed = max(1, plan.min_examples)
    if examples < needed:
        raise TrustError(f"{examples} examples, the plan asks for {needed}", advice="inspect the device")
