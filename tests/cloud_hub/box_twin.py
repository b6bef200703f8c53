"""A box in memory: says what a box says over a real broker, keeps what the hub told it.

Reads and writes one Bus connection and the test's folder.
Never a mock of the hub: the hub under test is the real one.
"""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fleet_link import chunks, envelope
from fleet_link.bus import Bus, BusConfig
from fleet_link.messages import (
    Agreement,
    AnyMessage,
    BundleRequest,
    Cohort,
    Heartbeat,
    Receipt,
    ReleaseOffer,
    ReleaseReport,
    RoundAnswer,
    RoundClosed,
    RoundPlan,
    RoundStatus,
    SharesForwarded,
    Survivors,
    TransferOffer,
    TransferProgress,
    TransferReceipt,
)
from fleet_link.pki import Identity, Trust
from fleet_link.topics import HUB, Channel, Direction, Topic, device_subscription
from tests.cloud_hub.masked_twin import MaskedTwin

RESEND_S = 1.0  # pause before what the hub has not receipted is said again
StageWord = Cohort | SharesForwarded | Survivors | Agreement

M = TypeVar("M")


class BoxTwin:
    def __init__(self, identity: Identity, files: BusConfig, trust: Trust, folder: Path, bundle_digest: str) -> None:
        self.identity = identity
        self.name = identity.name
        self.bundle_digest = bundle_digest
        self.release_version = 0
        self.alarms: tuple[str, ...] = ()
        self.round_state: dict[str, str] = {}
        self.heard: list[AnyMessage] = []
        self.sequences: list[int] = []
        self.hub_serials: list[str] = []
        self.bundles: list[Path] = []
        self.masked: MaskedTwin | None = None  # set by a test: it answers what a masked round asks, by itself
        self.outbox: dict[str, AnyMessage] = {}
        self._said_at = 0.0
        self.trust = trust
        self._folder = folder
        self._incoming: dict[str, chunks.Incoming] = {}
        self._outgoing: dict[str, chunks.Outgoing] = {}
        self._sequence = envelope.Sequence(time.time, 0, lambda highest: None)
        self._up = Topic(Direction.UP, self.name, Channel.MESSAGE)
        self.bus = Bus(files, [device_subscription(self.name)])
        self.bus.start()

    # --- what a test does with it

    def heartbeat(self) -> None:
        self.say(
            Heartbeat(
                message_id=new_id(), software_version="test", bundle_digest=self.bundle_digest,
                release_version=self.release_version, provider="CPUExecutionProvider", uptime_s=1, series_read=0,
                series_abstained=0, series_failed=0, quarantined=0, reviews=0, reviews_agreed=0, outbox_pending=0,
                disk_free_bytes=10**9, alarms=self.alarms,
                rounds=tuple(RoundStatus(round_id=r, state=state) for r, state in self.round_state.items()),
            )
        )  # fmt: skip

    def answer(self, round_id: str, *, joins: bool = True, examples: int = 20) -> None:
        self.round_state[round_id] = "training" if joins else "declined"
        self.say(RoundAnswer(message_id=new_id(), round_id=round_id, joins=joins, examples=examples))

    def upload(self, round_id: str, blob: bytes, *, sha256: str | None = None) -> str:
        """Gives the transfer id."""
        path = self._folder / f"{self.name}-{round_id}.sealed"
        path.write_bytes(blob)
        offer = chunks.new_offer(
            path, kind="update", subject=round_id, transfer_id=secrets.token_hex(16), message_id=new_id()
        )
        if sha256 is not None:
            offer = TransferOffer(
                message_id=offer.message_id, transfer_id=offer.transfer_id, kind="update", subject=round_id,
                sha256=sha256, size=offer.size, chunk_bytes=offer.chunk_bytes,
            )  # fmt: skip
        self._outgoing[offer.transfer_id] = chunks.Outgoing(path, offer)
        return offer.transfer_id

    def request(self, digest: str) -> None:
        self.say(BundleRequest(message_id=new_id(), bundle_digest=digest))

    def report(self, version: int, digest: str, outcome: str, reason: str = "", heldout: int = 0) -> None:
        self.say(
            ReleaseReport(
                message_id=new_id(), release_version=version, bundle_digest=digest, outcome=outcome,  # type: ignore[arg-type]
                reason=reason, heldout=heldout,
            )
        )  # fmt: skip

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.heard if isinstance(message, kind)]

    def verdicts(self, transfer_id: str) -> list[tuple[bool, str]]:
        return [(r.accepted, r.reason) for r in self.of(TransferReceipt) if r.transfer_id == transfer_id]

    # --- what it does by itself

    def say(self, message: AnyMessage, *, identity: Identity | None = None, sequence: int | None = None) -> bytes:
        number = sequence if sequence is not None else self._sequence.next()
        sealed = envelope.seal(identity or self.identity, HUB, message, sequence=number, now=time.time())
        self.send_raw(sealed)
        return sealed

    def send_raw(self, payload: bytes) -> None:
        self.bus.publish_message(self._up, payload)

    def step(self) -> None:
        while (received := self.bus.receive(0)) is not None:
            if received.topic.channel is Channel.CHUNK:
                transfer_id, _, _ = chunks.parse_frame(received.payload)
                if transfer_id in self._incoming:
                    self._incoming[transfer_id].on_chunk(received.payload)
                continue
            opened = envelope.open(received.payload, self.trust, sender=HUB, recipient=self.name, now=time.time())
            self.heard.append(opened.message)
            self.sequences.append(opened.sequence)
            self.hub_serials.append(opened.serial)
            self._react(opened.message)
        self._move(time.time())

    def _react(self, message: AnyMessage) -> None:
        match message:
            case TransferOffer():
                if message.transfer_id not in self._incoming:
                    folder = self._folder / f"{self.name}-incoming"
                    folder.mkdir(exist_ok=True)
                    self._incoming[message.transfer_id] = chunks.Incoming.open(folder, message, max_bytes=1 << 30)
            case TransferProgress():
                if message.transfer_id in self._outgoing:
                    self._outgoing[message.transfer_id].on_progress(message, time.time())
            case TransferReceipt():
                self._outgoing.pop(message.transfer_id, None)
            case RoundClosed():
                self.round_state[message.round_id] = "closed"
            case Receipt():
                self.outbox.pop(message.of, None)
            case RoundPlan() if self.masked is not None:
                self._answer_stage(message.round_id, message)
            case Cohort() | SharesForwarded() | Survivors() | Agreement():
                self._answer_stage(message.round_id, message)
            case _:
                assert isinstance(message, ReleaseOffer | RoundPlan), message

    def _answer_stage(self, round_id: str, message: RoundPlan | StageWord) -> None:
        assert self.masked is not None
        for answer in self.masked.hear(message, time.time()):
            if isinstance(answer, bytes):
                if not any(outgoing.offer.subject == round_id for outgoing in self._outgoing.values()):
                    self.upload(round_id, answer)
            else:
                self.outbox[answer.message_id] = answer
                self.say(answer)
        self.round_state[round_id] = self.masked.state

    def _move(self, now: float) -> None:
        if now - self._said_at > RESEND_S:
            self._said_at = now
            for message in self.outbox.values():
                self.say(message)
        for outgoing in self._outgoing.values():
            if outgoing.offer_due(now):
                self.say(outgoing.offer)
            for _, frame in outgoing.due(now):
                if not self.bus.publish_chunk(Topic(Direction.UP, self.name, Channel.CHUNK), frame):
                    break
        for transfer_id, incoming in list(self._incoming.items()):
            if incoming.complete:
                del self._incoming[transfer_id]
                self.bundles.append(incoming.finish())
                self.say(TransferReceipt(message_id=new_id(), transfer_id=transfer_id, accepted=True))
            elif incoming.progress_due(now):
                self.say(
                    TransferProgress(message_id=new_id(), transfer_id=transfer_id, received_bitmap=incoming.bitmap)
                )

    def close(self) -> None:
        self.bus.stop()


def new_id() -> str:
    return secrets.token_hex(16)


def until(condition: Callable[[], object], *steps: Callable[[], object], within_s: float = 60.0) -> None:
    """Let everybody go on until it holds; fails the test when it never does."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        for step in steps:
            step()
