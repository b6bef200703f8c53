"""Real boxes' rows against the hub's pure side of a masked round: everything but network, training child and clock.

Writes only under the folder it is given; every message goes through its bytes.
Never asserts; tests do.
"""

import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_hub import secure_sum
from cloud_hub.secure_sum import Circle, MaskedSum
from edge_agent import database, invitations, learn, ledger, masked, update
from edge_agent.learner import Learner
from edge_agent.rounds import State
from edge_agent.transfers import Transfers
from fleet_link import cohort, messages, sealing
from fleet_link.cohort import Judge, RoundOf
from fleet_link.messages import (
    AnyMessage,
    RoundAnswer,
    RoundClosed,
    RoundKeys,
    RoundPlan,
    Shares,
    Survivors,
    SurvivorsSigned,
    TransferReceipt,
    Unmask,
)
from fleet_link.sealing import plan_digest
from models import delta, round_layout
from tests.edge_agent.link_support import Box, make_box, make_plan, write_brightness_bundle
from tests.fleet_link.mosquitto_support import TestAuthority

ID = "0" * 32
ROUND = "round-1"
NAMES = ("box-1", "box-2", "box-3", "box-4", "box-5")
BODY = 200  # weights beside the head's four


class Never:
    def is_set(self) -> bool:
        return False


@dataclass(frozen=True)
class Hospitals:
    """Enrolled boxes with three reviewed series each, made once: a test starts from a copy."""

    folder: Path
    authority: TestAuthority

    @classmethod
    def build(cls, folder: Path) -> "Hospitals":
        authority = TestAuthority()
        for name in NAMES:
            (folder / name).mkdir()
            write_brightness_bundle(folder / name / "shipped.bundle", body=BODY)
            box = make_box(folder / name, authority, device=name)
            for number in range(3):
                box.add_reviewed(f"p{number}", bright=True, label="nodule")
            learn.collect(box.db, box.data_dir, box.holder.current.reader.bundle.manifest, 0.25)
            box.db.execute("UPDATE examples SET split = 'train'")
            box.db.close()
        return cls(folder, authority)


@dataclass
class Fleet:
    """Five boxes and a hub: the fewest of which one may drop out. `restarts`: every box is closed and opened again before each of its steps."""

    hospitals: Hospitals
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    restarts: bool = False
    changes: dict[str, Any] = field(default_factory=dict)  # of the plan
    policy: dict[str, Any] = field(default_factory=dict)  # of box-1
    strays: bool = False  # the training moves what the round did not draw
    boxes: dict[str, Box] = field(default_factory=dict)
    answers: dict[str, RoundAnswer] = field(default_factory=dict)
    keys: dict[str, RoundKeys] = field(default_factory=dict)
    made: dict[str, Shares] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    signed: dict[str, SurvivorsSigned] = field(default_factory=dict)
    given: dict[str, Unmask] = field(default_factory=dict)
    words: dict[str, NDArray[Any]] = field(default_factory=dict)  # before the masks
    deltas: dict[str, delta.Arrays] = field(default_factory=dict)
    newest: tuple[Any, Any] = (None, None)  # of the last training: words, delta
    sharing: tuple[str, ...] = ()
    circle: Circle = field(init=False)
    told: Survivors = field(init=False)

    def __post_init__(self) -> None:
        self.authority = self.hospitals.authority
        self.key = sealing.new_sealing_key(self.folder / "sealing.key")
        shutil.copytree(self.hospitals.folder, self.folder, dirs_exist_ok=True)
        for name in NAMES:
            own = {"min_examples": 2, "allow_unsafe_open_rounds": False} | (self.policy if name == "box-1" else {})
            self.boxes[name] = make_box(self.folder / name, self.authority, device=name, policy=own)
            _hurry(self.boxes[name])
        digest = self.boxes["box-1"].holder.current.digest
        values = {"kind": "masked", "min_cohort": 3, "word_bits": 16, "value_bits": 12, "boxes_max": 5}
        values |= {"clip_norm": 20.0, "examples_cap": 3} | self.changes
        self.plan: RoundPlan = make_plan(digest, sealing.public_bytes(self.key), **values)
        shapes = {"head.bias": (2,), "head.weight": (2,), "body.weight": (BODY,)}
        self.layout = round_layout.layout_of(self.plan, plan_digest(self.plan), shapes)
        self._training_ends_at_once()
        self.monkeypatch.setattr(os, "fsync", lambda _: None)

    def close(self) -> None:
        for box in self.boxes.values():
            box.db.close()

    # --- a box ------------------------------------------------------------------------------------

    def tell(self, name: str, message: AnyMessage) -> None:
        """As the link dispatches it."""
        box, now = self.box(name), time.time()
        received = messages.decode(messages.encode(message))
        if isinstance(received, RoundPlan):
            invitations.take(box.db, box.config, box.enrolled.identity, received, now)
        elif isinstance(received, RoundClosed):
            outcome = ledger.Outcome(reason=received.reason or None)
            ledger.apply(box.db, box.data_dir, received.round_id, ledger.Event.CLOSED_BY_HUB, now, outcome)
        elif isinstance(received, TransferReceipt):
            Transfers(box.db, box.data_dir, lambda _: None, lambda _: True).on_receipt(received, now)
        else:
            assert isinstance(received, masked.FromHub)
            masked.take(box.db, box.data_dir, box.enrolled, received, now)

    def box(self, name: str) -> Box:
        box = self.boxes[name]
        if self.restarts:
            box.db.close()
            box.db = database.connect(box.data_dir)
            _hurry(box)
        return box

    def train(self, name: str) -> None:
        box = self.box(name)
        learner = Learner(box.config, box.holder, box.enrolled, time.time)
        if self.restarts:
            learner.repair(box.db)
        learner.step(box.db, Never())  # type: ignore[arg-type]
        self.words[name], self.deltas[name] = self.newest

    def said(self, name: str) -> list[AnyMessage]:
        return ledger.pending(self.boxes[name].db)

    def state(self, name: str = "box-1") -> str:
        return self.boxes[name].state_of(ROUND)

    def states(self) -> set[str]:
        return {self.state(name) for name in NAMES}

    # --- the hub ----------------------------------------------------------------------------------

    def hear(self, away: Collection[str] = (), *, receipts: bool = True) -> None:
        for name in NAMES:
            for message in self.said(name):
                if name not in away:
                    self._store(name, messages.decode(messages.encode(message)))
                    if receipts:
                        ledger.received(self.box(name).db, message.message_id)

    def invite(self) -> None:
        for name in NAMES:
            self.tell(name, self.plan)

    def form(self, away: Collection[str] = ()) -> None:
        self.gather(away)
        for name in self.circle.graph:
            self.tell(name, self.cohort(name))

    def gather(self, away: Collection[str] = ()) -> None:
        """The circle of those who are not away; nobody is told yet."""
        self.hear(away)
        of = RoundOf(ROUND, plan_digest(self.plan))
        sent = {name: message.keys for name, message in self.keys.items() if name not in away}
        for name, keys in sent.items():
            cohort.verify_keys(keys, name, of, Judge(self.authority.trust, time.time()))
        self.circle = secure_sum.form_circle(of, sent, self.plan.min_cohort)

    def cohort(self, name: str) -> messages.Cohort:
        return secure_sum.cohort_for(self.circle, name, message_id=ID)

    def forward(self, away: Collection[str] = ()) -> None:
        self.hear(away)
        for name, made in self.made.items():
            secure_sum.check_shares(self.circle, name, made)
        self.sharing = secure_sum.settle_shares(self.circle, self.made)
        for name in self.sharing:
            self.tell(name, self.forwarded(name))

    def forwarded(self, name: str) -> messages.SharesForwarded:
        return secure_sum.forwarded_for(self.circle, self.sharing, self.made, name, message_id=ID)

    def collect(self, away: Collection[str] = (), *, receipts: bool = True) -> None:
        """Train, upload, receipt."""
        for name in self.sharing:
            if name not in away:
                self.train(name)
                self.take_upload(name)
                if receipts:
                    self.tell(name, self.receipt(name))

    def take_upload(self, name: str) -> None:
        box = self.boxes[name]
        (transfer,) = box.rows("transfers_out")
        opened = sealing.open_update(
            (box.data_dir / transfer["path"]).read_bytes(),
            private_key=self.key,
            trust=self.authority.trust,
            sender=name,
            plan=self.plan,
            now=time.time(),
        )
        self.uploads[name] = opened.payload

    def receipt(self, name: str) -> TransferReceipt:
        (transfer,) = self.boxes[name].rows("transfers_out")
        return TransferReceipt(message_id=ID, transfer_id=transfer["transfer_id"], accepted=True)

    def lists(self, active: tuple[str, ...] = NAMES, dropped: tuple[str, ...] = ()) -> Survivors:
        digest = self.circle.digest
        return Survivors(message_id=ID, round_id=ROUND, cohort_digest=digest, active=active, dropped=dropped)

    def tell_survivors(self) -> None:
        self.told = secure_sum.settle_survivors(self.circle, self.sharing, self.uploads, message_id=ID)
        for name in self.told.active:
            self.tell(name, self.told)

    def agree(self, away: Collection[str] = ()) -> None:
        self.hear(away)
        for name, signed in self.signed.items():
            secure_sum.check_signature(self.circle, self.told, name, signed)
        secure_sum.settle_agreement(self.circle, self.told, self.signed)
        for name in self.signed:
            self.tell(name, self.agreement(name))

    def agreement(self, name: str) -> messages.Agreement:
        return secure_sum.agreement_for(self.circle, self.signed, name, message_id=ID)

    def sum(self, away: Collection[str] = ()) -> NDArray[np.signedinteger]:
        self.hear(away)
        for name, given in self.given.items():
            secure_sum.check_unmask(self.circle, self.told, name, given)
        rebuilt = secure_sum.rebuild(self.circle, self.told, self.given)
        total = MaskedSum(self.layout.word_count, self.plan.word_bits)
        for name in self.told.active:
            total.add(self.uploads[name])
        return secure_sum.unmask(total, self.circle, self.told, rebuilt)

    def plain_sum(self) -> NDArray[np.signedinteger]:
        """Of the words that the active boxes masked; modulo the word."""
        total = np.zeros(self.layout.word_count, f"i{self.plan.word_bits // 8}")
        for name in self.told.active:
            total += self.words[name]
        return total

    def to_stage(self, stage: str) -> None:
        """The good way as far as the stage's state."""
        steps: dict[str, Callable[[], None]] = {
            "keyed": self.invite,
            "shared": self.form,
            "training": self.forward,
            "uploading": lambda: self.collect(receipts=False),
            "delivered": lambda: [self.tell(name, self.receipt(name)) for name in self.sharing] and None,
            "agreed": self.tell_survivors,
            "unmasked": self.agree,
        }
        for name, step in steps.items():
            step()
            if name == stage:
                return

    def close_round(self, outcome: str = "released", reason: str = "") -> None:
        for name in NAMES:
            self.tell(name, RoundClosed(message_id=ID, round_id=ROUND, outcome=outcome, reason=reason))  # type: ignore[arg-type]

    def _store(self, name: str, message: AnyMessage) -> None:
        match message:
            case RoundAnswer():
                self.answers[name] = message
            case RoundKeys():
                self.keys[name] = message
            case Shares():
                self.made[name] = message
            case SurvivorsSigned():
                self.signed[name] = message
            case Unmask():
                self.given[name] = message

    def _training_ends_at_once(self) -> None:
        """Each training learns something else, where the round moves it: also the same box's second one."""
        chance = np.random.default_rng(3)
        to_words = update.to_words

        def train(_plan: RoundPlan, base: Any, *_: object) -> learn.Trained:
            moves = {name: self.strays or mask for name, mask in self.layout.drawn.masks().items()}
            weights = {
                name: value + (chance.normal(size=value.shape) * moves[name]).astype(np.float32)
                for name, value in base.weights.items()
            }
            return learn.Trained(weights, learn.Report(3, 0, 0, 0, 0.1, 1))

        def recorded(change: delta.Arrays, plan: RoundPlan, examples: int) -> update.Addable:
            made = to_words(change, plan, examples)
            self.newest = made.words.copy(), change
            return made

        self.monkeypatch.setattr(learn, "train", train)
        self.monkeypatch.setattr(update, "to_words", recorded)


def _hurry(box: Box) -> None:
    """Kills are exceptions here, no power cuts: nothing needs to reach the disk."""
    box.db.execute("PRAGMA synchronous=OFF")


def kinds(fleet: Fleet, name: str = "box-1") -> list[str]:
    return [type(message).__name__ for message in fleet.said(name)]


def secrets_of(fleet: Fleet, name: str = "box-1") -> tuple[bytes, ...]:
    part = ledger.part_of(fleet.boxes[name].db, ROUND)
    assert part is not None
    return (part.secrets.mask_secret, part.secrets.self_secret, part.secrets.share_key)


def on_disk(fleet: Fleet, secrets: tuple[bytes, ...]) -> list[bool]:
    files = [path.read_bytes() for path in fleet.boxes["box-1"].data_dir.glob("box.db*")]
    return [any(secret in content for content in files) for secret in secrets]


def the_no(fleet: Fleet, name: str = "box-1") -> RoundAnswer:
    (answer,) = [message for message in fleet.said(name) if isinstance(message, RoundAnswer)]
    assert not answer.joins
    return answer


def is_out(fleet: Fleet, name: str = "box-1") -> bool:
    """Declined, nothing but the no left to say, no secret, no update, no transfer."""
    box = fleet.boxes[name]
    return (
        fleet.state(name) == State.DECLINED
        and kinds(fleet, name) == ["RoundAnswer"]
        and not box.rows("masked_parts")
        and not box.rows("transfers_out")
        and not list((box.data_dir / "updates").glob("*"))
    )
