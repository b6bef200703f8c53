"""What fine-tuning changed becomes a sealed update: delta, clip, encode, seal and sign.

Reads weights in memory; gives the sealed bytes.
Never writes to disk, never lets a weight leave unsealed.
Source: ARCHITECTURE.md, "The link"; the delta codec is models.delta, the envelope fleet_link.sealing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.learn import CannotTrainError
from fleet_link import pki, sealing
from fleet_link.messages import RoundPlan
from models import delta
from models.errors import DeltaError

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Update:
    sealed: bytes
    norm_before_clip: float


def build(before: Weights, after: Weights, plan: RoundPlan, identity: pki.Identity, examples: int) -> Update:
    """The delta is the same for the same weights and plan; only its sealing is fresh each time.

    Raises CannotTrainError when the trained weights do not fit the base or are not finite.
    """
    try:
        names = delta.trainable_names(before, plan.trainable)
        change, norm = delta.clip(delta.subtract(after, before, names), plan.clip_norm)
        payload = delta.encode(change, rounding_seed(plan, identity.name))
    except DeltaError as error:
        raise CannotTrainError(f"the trained weights cannot be sent: {error}", advice=error.advice) from error
    return Update(sealing.seal_update(payload, identity=identity, plan=plan, examples=examples), norm)


def rounding_seed(plan: RoundPlan, device: str) -> int:
    """Its own for each device: with one for all, the rounding errors of a cohort would add up instead of averaging out."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed}|{device}".encode()).digest()[:8], "little")
