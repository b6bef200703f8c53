"""A masked round over a real Mosquitto: one box with its link, the others and the hub's arithmetic in memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cloud_hub import secure_sum
from edge_agent import learn, ledger, masking, update
from edge_agent.learner import Learner
from edge_agent.rounds import State
from fleet_link import sealing
from fleet_link.cohort import Judge
from fleet_link.messages import (
    Heartbeat,
    RoundAnswer,
    RoundClosed,
    RoundKeys,
    Shares,
    Survivors,
    SurvivorsSigned,
    Unmask,
)
from fleet_link.pki import Identity
from models.bundle import Bundle
from tests.edge_agent.link_support import DEVICE
from tests.edge_agent.masked_fleet import Never
from tests.edge_agent.test_link import House, house, teach  # noqa: F401
from tests.masked_support import changed, flipped, round_of

pytestmark = pytest.mark.slow

ID = "0" * 32
OTHERS = ("box-2", "box-3", "box-4")
LEARNED = np.array([0.5, -0.25], np.float32)


@dataclass
class Circle:
    """The other boxes' parts, and what the hub does with what it hears of all."""

    house: House
    parts: dict[str, masking.Part] = field(default_factory=dict)
    identities: dict[str, Identity] = field(default_factory=dict)
    made: dict[str, Shares] = field(default_factory=dict)
    signed: dict[str, SurvivorsSigned] = field(default_factory=dict)
    given: dict[str, Unmask] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {"word_bits": 16, "value_bits": 12, "boxes_max": 4, "examples_cap": 6, "min_cohort": 3}
        self.plan = self.house.plan(kind="masked", clip_norm=2.0, **numbers)

    def heard(self, kind: type[Any]) -> Any:
        self.house.until(lambda: self.house.hub.of(kind))
        return self.house.hub.of(kind)[-1]

    def invite(self) -> None:
        self.house.hub.say(self.plan)
        keys = {DEVICE: self.heard(RoundKeys).keys}
        for name in OTHERS:
            self.identities[name] = self.house.authority.issue(name)
            self.parts[name], said = masking.begin(
                self.plan, self.identities[name], masking.draw_secrets(), min_cohort=3, message_id=ID
            )
            keys[name] = said.keys
        self.circle = secure_sum.form_circle(round_of(self.plan), keys, 3)

    def share(self) -> None:
        self.house.hub.say(secure_sum.cohort_for(self.circle, DEVICE, message_id=ID))
        self.made[DEVICE] = self.heard(Shares)
        judge = Judge(self.house.authority.trust, time.time())
        for name in OTHERS:
            shown = secure_sum.cohort_for(self.circle, name, message_id=ID)
            self.parts[name], self.made[name] = masking.enter(self.parts[name], shown, judge, message_id=ID)
        self.sharing = secure_sum.settle_shares(self.circle, self.made)

    def upload(self) -> None:
        box = self.house.box
        self.house.hub.say(self._forwarded(DEVICE))
        self.house.until(lambda: box.state_of("round-1") == State.TRAINING)
        Learner(box.config, box.holder, box.enrolled, time.time).step(box.db, Never())  # type: ignore[arg-type]
        self.house.until(lambda: box.state_of("round-1") == State.DELIVERED)
        sealed = self.house.hub.updates["round-1"]
        opened = sealing.open_update(
            sealed,
            private_key=self.house.hub.sealing_key,
            trust=self.house.authority.trust,
            sender=DEVICE,
            plan=self.plan,
            now=time.time(),
        )
        self.uploads[DEVICE] = opened.payload
        for name in OTHERS:
            self.words[name] = np.arange(len(opened.payload) // 2, dtype=np.int16)
            part = masking.admit(self.parts[name], self._forwarded(name))
            self.parts[name], self.uploads[name] = masking.mask(part, self.words[name])

    def agree(self) -> None:
        self.told: Survivors = secure_sum.settle_survivors(self.circle, self.sharing, self.uploads, message_id=ID)
        self.house.hub.say(self.told)
        self.signed[DEVICE] = self.heard(SurvivorsSigned)
        secure_sum.check_signature(self.circle, self.told, DEVICE, self.signed[DEVICE])
        for name in OTHERS:
            self.parts[name], self.signed[name] = masking.sign_survivors(
                self.parts[name], self.identities[name], self.told, message_id=ID
            )

    def sum(self) -> Any:
        self.house.hub.say(secure_sum.agreement_for(self.circle, self.signed, DEVICE, message_id=ID))
        self.given[DEVICE] = self.heard(Unmask)
        secure_sum.check_unmask(self.circle, self.told, DEVICE, self.given[DEVICE])
        for name in OTHERS:
            agreement = secure_sum.agreement_for(self.circle, self.signed, name, message_id=ID)
            self.given[name] = masking.unmask(self.parts[name], agreement, message_id=ID)
        rebuilt = secure_sum.rebuild(self.circle, self.told, self.given)
        total = secure_sum.MaskedSum(len(self.words[DEVICE]), 16)
        for upload in self.uploads.values():
            total.add(upload)
        return secure_sum.unmask(total, self.circle, self.told, rebuilt)

    def _forwarded(self, name: str) -> Any:
        return secure_sum.forwarded_for(self.circle, self.sharing, self.made, name, message_id=ID)


@pytest.fixture
def circle(house: House, monkeypatch: pytest.MonkeyPatch) -> Circle:  # noqa: F811
    """The link runs; the box's training child ends at once."""
    teach(house.box)
    made = Circle(house)
    to_words: Callable[..., update.Addable] = update.to_words

    def train(_plan: object, base: Bundle, *_: object) -> learn.Trained:
        weights = {name: value + LEARNED for name, value in base.weights.items()}
        return learn.Trained(weights, learn.Report(6, 0, 0, 0, 0.1, 1))

    def recorded(*arguments: Any) -> update.Addable:
        words = to_words(*arguments)
        made.words[DEVICE] = words.words.copy()
        return words

    monkeypatch.setattr(learn, "train", train)
    monkeypatch.setattr(update, "to_words", recorded)
    monkeypatch.setattr("edge_agent.link.RESEND_S", 0.2)
    house.start_link()
    return made


def test_a_masked_round_from_plan_to_close(circle: Circle) -> None:
    """The link is stopped and started between the stages; the sum is right to the last bit."""
    box, hub = circle.house.box, circle.house.hub
    circle.invite()
    circle.share()
    circle.house.stop_link()
    circle.house.start_link()
    circle.upload()
    circle.agree()
    circle.house.stop_link()
    circle.house.start_link()
    total = circle.sum()
    assert (total == sum(circle.words.values())).all()
    circle.house.until(lambda: State.UNMASKED in [status.state for status in hub.of(Heartbeat)[-1].rounds])
    hub.say(RoundClosed(message_id="c" * 32, round_id="round-1", outcome="released"))
    circle.house.until(lambda: box.state_of("round-1") == State.CLOSED)
    assert (box.rows("masked_parts"), box.rows("link_outbox")) == ([], [])
    assert not circle.house.alarms()


def test_each_stage_is_said_until_the_hub_has_it(circle: Circle) -> None:
    hub = circle.house.hub
    hub.receipts = False
    circle.invite()
    circle.share()
    for kind in (RoundAnswer, RoundKeys, Shares):
        circle.house.until(lambda kind=kind: len(hub.of(kind)) >= 3)  # type: ignore[misc]
        assert len({message.message_id for message in hub.of(kind)}) == 1
    hub.receipts = True
    circle.house.until(lambda: not circle.house.box.rows("link_outbox"))


def test_a_hub_that_lies_is_told_on_and_gets_nothing(circle: Circle) -> None:
    """An alarm, a no with its reason, and no secret left: nor does the good cohort, said later, change that."""
    box, hub = circle.house.box, circle.house.hub
    circle.invite()
    good = secure_sum.cohort_for(circle.circle, DEVICE, message_id=ID)
    hub.say(changed(good, keys_digests=flipped(good.keys_digests)))
    circle.house.until(lambda: box.state_of("round-1") == State.DECLINED)
    circle.house.until(lambda: "the cohort lists other keys" in circle.house.alarms())
    circle.house.until(lambda: not hub.of(RoundAnswer)[-1].joins)
    assert "the cohort lists other keys" in hub.of(RoundAnswer)[-1].reason
    assert box.rows("masked_parts") == []
    circle.house.until(lambda: not box.rows("link_outbox"))
    said = len(hub.of(RoundAnswer))
    hub.say(good)
    hub.say(circle.plan)
    circle.house.until(lambda: len(hub.of(RoundAnswer)) > said)  # to the plan: the cohort before it was read
    assert hub.of(Shares) == []
    assert ledger.find(box.db, "round-1").state is State.DECLINED  # type: ignore[union-attr]
