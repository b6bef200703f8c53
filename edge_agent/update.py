"""What fine-tuning changed becomes a sealed update: delta, clip, encode, in a masked round mask, seal and sign.

Reads weights in memory; gives the sealed bytes.
Never writes to disk, never lets a weight leave unsealed.
Source: ARCHITECTURE.md, "The link"; the codecs are models.delta, models.drawn_delta and models.addable, the envelope
fleet_link.sealing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_agent import masking
from edge_agent.learn import CannotTrainError
from edge_agent.masking import Part
from fleet_link import pki, sealing
from fleet_link.messages import RoundPlan
from models import addable, delta, round_layout
from models.delta import Arrays
from models.errors import DeltaError

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Update:
    sealed: bytes
    norm_before_clip: float
    part: Part | None = None  # of a masked round: knows its one update from now on


@dataclass(frozen=True)
class Addable:
    words: NDArray[np.signedinteger] = field(repr=False)  # of the plan's word size
    norm_before_clip: float


def change_of(before: Weights, after: Weights, plan: RoundPlan) -> Arrays:
    """What the training changed of the weights that the round moves.

    Raises CannotTrainError where the two do not fit, or the training diverged.
    """
    try:
        return delta.subtract(after, before, delta.trainable_names(before, plan.trainable))
    except DeltaError as error:
        raise CannotTrainError(f"the trained weights cannot be sent: {error}", advice=error.advice) from error


def build(change: Arrays, plan: RoundPlan, identity: pki.Identity, examples: int) -> Update:
    """The payload is the same for the same change and plan; only its sealing is fresh each time.

    Raises CannotTrainError when the change does not fit the plan or is not finite.
    """
    try:
        change, norm = delta.clip(change, plan.clip_norm)
        codec = round_layout.codec_of(plan, sealing.plan_digest(plan), _shapes(change))
        seed = rounding_seed(plan, identity.name)
        payload = codec.encode(change, seed) if codec else delta.encode(change, seed)
    except DeltaError as error:
        raise CannotTrainError(f"the trained weights cannot be sent: {error}", advice=error.advice) from error
    return Update(sealing.seal_update(payload, identity=identity, plan=plan, examples=examples), norm)


def to_words(change: Arrays, plan: RoundPlan, examples: int) -> Addable:
    """The change as words that add up. Rounded anew each time, so no two are alike. Raises CannotTrainError as `build`."""
    try:
        layout = round_layout.layout_of(plan, sealing.plan_digest(plan), _shapes(change))
        layout.drawn.check_alone(change)
        weight_share = round_layout.weight_share(examples, plan)
        words, _ = addable.encode(change, layout, weight_share, np.random.default_rng())  # the system's randomness
    except DeltaError as error:
        raise CannotTrainError(f"the trained weights cannot be sent: {error}", advice=error.advice) from error
    return Addable(words.view(f"i{words.itemsize}"), delta.norm(change))


def build_masked(made: Addable, plan: RoundPlan, identity: pki.Identity, examples: int, part: Part) -> Update:
    """Sealed as well: neither broker nor wiretap sees what only the hub may add up.

    Raises TrustError where this part has masked another update before: see masking.mask.
    """
    masked_part, payload = masking.mask(part, made.words)
    sealed = sealing.seal_update(payload, identity=identity, plan=plan, examples=examples)
    return Update(sealed, made.norm_before_clip, masked_part)


def rounding_seed(plan: RoundPlan, device: str) -> int:
    """Its own for each device: with one for all, the rounding errors of a cohort would add up instead of averaging out."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed}|{device}".encode()).digest()[:8], "little")


def _shapes(change: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in change.items()}
