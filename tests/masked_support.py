"""A masked round in memory: real boxes' parts, the hub's pure side, real certificates, small vectors.

Reads and writes nothing; who is away at which stage is the test's to say.
Never asserts; tests do.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub import secure_sum
from cloud_hub.secure_sum import Circle, MaskedSum
from edge_agent import masking as box
from edge_agent.masking import Part
from fleet_link import cohort
from fleet_link.cohort import Judge, RoundOf
from fleet_link.messages import RoundPlan, Shares, Survivors, SurvivorsSigned, Unmask
from fleet_link.pki import Identity
from fleet_link.sealing import plan_digest
from tests.fleet_link.mosquitto_support import TestAuthority

AUTHORITY = TestAuthority()
NOW = AUTHORITY.certificate.not_valid_before_utc.timestamp() + 400 * 86_400
JUDGE = Judge(AUTHORITY.trust, NOW)
ID = "0" * 32
COUNT = 23  # words of a test's vector


@cache
def identity(name: str) -> Identity:
    return AUTHORITY.issue(name)


def names_of(count: int) -> list[str]:
    return [f"box-{number:02}" for number in range(1, count + 1)]


def plan(**changes: Any) -> RoundPlan:
    """A plan as today's hub writes it, but for what the test changes."""
    values: dict[str, Any] = {
        "message_id": ID,
        "round_id": "round-1",
        "kind": "masked",
        "base_digest": "a" * 64,
        "rule": "fedavg",
        "trainable": "all",
        "clip_norm": 1.0,
        "epochs": 2,
        "learning_rate": 0.001,
        "min_examples": 4,
        "seed": 7,
        "sealing_key": b"k" * 32,
        "deadline_unix_s": 2_000_000_000.0,
    }
    return RoundPlan(**(values | changes))


def round_of(the_plan: RoundPlan) -> RoundOf:
    return RoundOf(the_plan.round_id, plan_digest(the_plan))


def integers(name: str, word_bits: int = 32, count: int = COUNT) -> NDArray[np.signedinteger]:
    """The whole range of the word: sums of a few wrap around."""
    info = np.iinfo(f"int{word_bits}")
    seed = int.from_bytes(name.encode(), "little")
    return np.random.default_rng(seed).integers(info.min, info.max, count, dtype=info.dtype, endpoint=True)


def plain_sum(names: Collection[str], word_bits: int = 32) -> NDArray[np.signedinteger]:
    total = np.zeros(COUNT, f"int{word_bits}")
    for name in names:
        total += integers(name, word_bits)
    return total


@dataclass
class Round:
    """Each stage in its turn, as drivers will do it; `parts` go through bytes between all steps, as after a restart."""

    names: list[str]
    plan: RoundPlan = field(default_factory=plan)
    min_cohort: int = 2
    parts: dict[str, Part] = field(default_factory=dict)
    made: dict[str, Shares] = field(default_factory=dict)
    sharing: tuple[str, ...] = ()
    uploads: dict[str, bytes] = field(default_factory=dict)
    signed: dict[str, SurvivorsSigned] = field(default_factory=dict)
    circle: Circle = field(init=False)
    told: Survivors = field(init=False)

    def keys(self, away: Collection[str] = ()) -> "Round":
        sent = {}
        for name in self.names:
            part, message = box.begin(
                self.plan, identity(name), box.draw_secrets(), min_cohort=self.min_cohort, message_id=ID
            )
            self._keep(part)
            if name not in away:
                cohort.verify_keys(message.keys, name, round_of(self.plan), JUDGE)
                sent[name] = message.keys
        self.circle = secure_sum.form_circle(round_of(self.plan), sent, self.plan.min_cohort)
        return self

    def shares(self, away: Collection[str] = ()) -> "Round":
        for name in self.circle.graph:
            if name in away:
                continue
            shown = secure_sum.cohort_for(self.circle, name, message_id=ID)
            part, made = box.enter(self.parts[name], shown, JUDGE, message_id=ID)
            self._keep(part)
            secure_sum.check_shares(self.circle, name, made)
            self.made[name] = made
        self.sharing = secure_sum.settle_shares(self.circle, self.made)
        return self

    def upload(self, away: Collection[str] = ()) -> "Round":
        for name in self.sharing:
            if name in away:
                continue
            forwarded = secure_sum.forwarded_for(self.circle, self.sharing, self.made, name, message_id=ID)
            self._keep(box.admit(self.parts[name], forwarded))
            part, masked = box.mask(self.parts[name], integers(name, self.plan.word_bits))
            self._keep(part)
            self.uploads[name] = masked
        self.told = secure_sum.settle_survivors(self.circle, self.sharing, self.uploads, message_id=ID)
        return self

    def agree(self, away: Collection[str] = ()) -> "Round":
        for name in self.told.active:
            if name in away:
                continue
            part, signed = box.sign_survivors(self.parts[name], identity(name), self.told, message_id=ID)
            self._keep(part)
            secure_sum.check_signature(self.circle, self.told, name, signed)
            self.signed[name] = signed
        secure_sum.settle_agreement(self.circle, self.told, self.signed)
        return self

    def unmask(self, away: Collection[str] = ()) -> dict[str, Unmask]:
        given = {}
        for name in self.signed:
            if name in away:
                continue
            agreement = secure_sum.agreement_for(self.circle, self.signed, name, message_id=ID)
            given[name] = box.unmask(self.parts[name], agreement, message_id=ID)
            secure_sum.check_unmask(self.circle, self.told, name, given[name])
        return given

    def sum(self, given: Mapping[str, Unmask]) -> NDArray[np.signedinteger]:
        rebuilt = secure_sum.rebuild(self.circle, self.told, given)
        total = MaskedSum(COUNT, self.plan.word_bits)
        for name in self.told.active:
            total.add(self.uploads[name])
        return secure_sum.unmask(total, self.circle, self.told, rebuilt)

    def _keep(self, part: Part) -> None:
        self.parts[part.name] = box.decode(box.encode(part))


def changed(message: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(message, **changes)


def flipped(value: bytes, position: int = -1) -> bytes:
    """With one bit turned."""
    turned = bytearray(value)
    turned[position] ^= 1
    return bytes(turned)
