"""Masked rounds on disk: a hub's rounds and boxes that do their part, message by message, without a network.

Reads and writes the test's own folder; which answers are withheld is the test's to say (masked_twin.py).
Never a mock: hub and boxes run the code that runs in a fleet.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cloud_hub import ledger, masked, views
from cloud_hub.database import MaskedPart, Refusal
from cloud_hub.rounds import COLLECTING, Member, State
from fleet_link.messages import AnyMessage, RoundAnswer, RoundPlan
from models import delta
from models.bundle import SHIPPED, read_bundle
from models.delta import Arrays
from tests.cloud_hub.masked_twin import MaskedTwin, plain_mean
from tests.cloud_hub.round_support import RoundHub, make_round_hub

UPDATE = bytes  # how a twin's update is named among what it withholds


@dataclass
class House:
    """A hub's rounds on disk and five boxes that do masked rounds."""

    hub: RoundHub
    twins: dict[str, MaskedTwin] = field(default_factory=dict)
    said: dict[tuple[str, type[Any]], Any] = field(default_factory=dict)
    restarts: bool = False  # the hub is killed after every message

    def start(self, **changes: object) -> RoundPlan:
        plan = self.hub.start(kind="masked", **changes)
        for number, name in enumerate(self.hub.boxes, 1):
            self.twins[name] = MaskedTwin(self.hub.boxes[name].identity, self.hub.trust, value=0.01 * number)
        return plan

    def owed(self, name: str) -> AnyMessage | None:
        """What the link would say to the box now."""
        with self.hub.files.database.reading() as session:
            row, part = self.hub.round(), self.hub.member(name)
            if part.state == Member.INVITED and State(row.state) in COLLECTING:
                return ledger.plan_of(row)
            return masked.owed(session, row.round_id, State(row.state), name, Member(part.state), secrets.token_hex(16))

    def give(self, name: str, answer: AnyMessage | bytes) -> tuple[bool, str]:
        self.said[name, type(answer)] = answer
        intake, now = self.hub.intake, self.hub.now
        if isinstance(answer, bytes):
            reason = self.hub.deliver(name, answer)
            verdict = (not reason, reason)
        elif isinstance(answer, RoundAnswer):
            verdict = intake.answered(name, answer, now)
        else:
            assert isinstance(answer, masked.StageMessage)
            verdict = intake.took(name, answer, now)
        if self.restarts:
            self.hub.restart()
        return verdict

    def play(self, until: str) -> None:
        """Everybody answers what it is told, until the round is there or nothing goes on."""
        while self.hub.round().state != until:
            before = self.facts()
            for name, twin in self.twins.items():
                message = self.owed(name)
                for answer in twin.hear(message, self.hub.now) if message is not None else ():
                    if self.hub.round().state != until:
                        assert self.give(name, answer) == (True, ""), (name, type(answer))
            if self.facts() == before:
                return

    def facts(self) -> tuple[str, list[str]]:
        return self.hub.round().state, [self.hub.member(name).state for name in self.twins]

    def wait(self, seconds: float) -> None:
        self.hub.now += seconds
        self.hub.coordinator.tick(self.hub.now)

    def withhold(self, kind: type[Any], *names: str) -> None:
        for name in names:
            self.twins[name].withheld.add(kind)

    def check_release(self, plan: RoundPlan, names: str) -> None:
        """What is released is the base and the plain mean of these boxes, to the last bit."""
        self.check_released_mean(plain_mean(plan, [self.twins[name] for name in names]))

    def check_released_mean(self, mean: Arrays) -> None:
        row = self.hub.tick_until("released")
        expected = delta.apply(read_bundle(SHIPPED).weights, mean)
        after = read_bundle(self.hub.repository.bundle_path(str(row.candidate_digest))).weights
        assert all(np.array_equal(after[name], expected[name]) for name in expected)
        assert any(not np.array_equal(after[name], read_bundle(SHIPPED).weights[name]) for name in mean)


def refusals(house: House, device: str) -> list[str]:
    with house.hub.files.database.reading() as session:
        return [row.reason for row in session.query(Refusal).filter_by(device=device)]


def rows(house: House) -> list[MaskedPart]:
    with house.hub.files.database.reading() as session:
        return session.query(MaskedPart).all()


def came(house: House) -> dict[str, int]:
    with house.hub.files.database.reading() as session:
        found: dict[str, int] = views.round_(session, house.hub.round_id)["came"]
    return found


@contextmanager
def opened(folder: Path, *names: str) -> Iterator[House]:
    made = House(make_round_hub(folder, *names))
    yield made
    made.hub.coordinator.stop()
    made.hub.files.database.close()
