"""A box's part in masked rounds, in memory: every answer comes from edge_agent.masking itself.

Reads messages of the hub; gives what a box would say, and its sealed update; goes through bytes between all steps.
Never a mock: certificates, signatures, shares and masks are real; which answers are withheld is the test's to say.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent import masking as box
from fleet_link import masking, sealing
from fleet_link.cohort import Judge
from fleet_link.messages import (
    Agreement,
    AnyMessage,
    Cohort,
    RoundAnswer,
    RoundKeys,
    RoundPlan,
    Shares,
    SharesForwarded,
    Survivors,
    SurvivorsSigned,
    Unmask,
)
from fleet_link.pki import Identity, Trust
from models import addable, round_layout
from models.addable import Layout
from models.delta import Arrays
from tests.cloud_hub.round_support import shapes

IDS = {kind: f"{number:032x}" for number, kind in enumerate((RoundAnswer, RoundKeys, Shares, SurvivorsSigned, Unmask))}
STATES = {RoundKeys: "keyed", Shares: "shared", bytes: "uploading", SurvivorsSigned: "agreed", Unmask: "unmasked"}
EXAMPLES = 20


def layout_of(plan: RoundPlan) -> Layout:
    return round_layout.layout_of(plan, sealing.plan_digest(plan), shapes(plan))


@dataclass
class MaskedTwin:
    identity: Identity
    trust: Trust
    value: float = 0.01  # its update changes every weight of the round by about this
    withheld: set[type[Any]] = field(default_factory=set)  # kinds of answers it does not give; bytes: the update
    asked: set[type[Any]] = field(default_factory=set)  # what it was asked for, withheld or not
    plan: RoundPlan | None = None
    words: NDArray[np.unsignedinteger] | None = None  # its update before it was masked
    state: str = ""
    _kept: bytes = b""
    _sealed: bytes = b""

    def hear(self, message: AnyMessage, now: float) -> list[AnyMessage | bytes]:
        """What the box says to this; bytes are its sealed update."""
        made = self._answers(message, now)
        self.asked.update(type(answer) for answer in made)
        given = [answer for answer in made if type(answer) not in self.withheld]
        for answer in given:
            self.state = STATES.get(type(answer), self.state)
        return given

    def _answers(self, message: AnyMessage, now: float) -> list[AnyMessage | bytes]:
        match message:
            case RoundPlan():
                return self._begin(message)
            case Cohort():
                part, made = box.enter(self._part, message, Judge(self.trust, now), message_id=IDS[Shares])
                self._keep(part)
                return [made]
            case SharesForwarded():
                return [self._mask(message)]
            case Survivors():
                part, signed = box.sign_survivors(self._part, self.identity, message, message_id=IDS[SurvivorsSigned])
                self._keep(part)
                return [signed]
            case Agreement():
                return [box.unmask(self._part, message, message_id=IDS[Unmask])]
        return []

    @property
    def _part(self) -> box.Part:
        return box.decode(self._kept)

    def _keep(self, part: box.Part) -> None:
        self._kept = box.encode(part)

    def _begin(self, plan: RoundPlan) -> list[AnyMessage | bytes]:
        secrets = self._part.secrets if self.plan is not None else box.draw_secrets()
        part, keys = box.begin(plan, self.identity, secrets, min_cohort=3, message_id=IDS[RoundKeys])
        if self.plan is None:
            self.plan = plan
            self._keep(part)
        answer = RoundAnswer(message_id=IDS[RoundAnswer], round_id=plan.round_id, joins=True, examples=EXAMPLES)
        return [answer, keys]

    def _mask(self, forwarded: SharesForwarded) -> bytes:
        assert self.plan is not None
        if not self._sealed:
            part = box.admit(self._part, forwarded)
            self.words = self.encoded(self.plan)
            part, masked = box.mask(part, self.words)
            self._keep(part)
            self._sealed = sealing.seal_update(masked, identity=self.identity, plan=self.plan, examples=EXAMPLES)
        return self._sealed

    def encoded(self, plan: RoundPlan) -> NDArray[np.unsignedinteger]:
        layout = layout_of(plan)
        change = {name: np.full(shape, self.value, np.float32) for name, shape in layout.shapes.items()}
        share = round_layout.weight_share(EXAMPLES, plan)
        words, _ = addable.encode(change, layout, share, np.random.default_rng(7))
        return words


def plain_mean(plan: RoundPlan, twins: list[MaskedTwin]) -> Arrays:
    """What the hub must find, from updates that were never masked."""
    updates = [twin.words for twin in twins if twin.words is not None]
    assert len(updates) == len(twins)
    return mean_of(plan, updates)


def mean_of(plan: RoundPlan, updates: list[NDArray[np.unsignedinteger]]) -> Arrays:
    layout = layout_of(plan)
    total = masking.zeros(layout.word_count, plan.word_bits)
    for words in updates:
        np.add(total, words, out=total)
    return addable.decode_sum(total, layout)
