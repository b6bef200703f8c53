"""The two ends of a transfer through a real broker, each its own process, so that each can be killed -9.

Reads identity files and a spool folder; tells its parent on stdout: `progress <chunks>`, `done <path or seconds>`.
Never part of the product: edge_agent.link and cloud_hub.transfers drive the same calls.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fleet_link import chunks, envelope
from fleet_link.bus import Bus, BusConfig
from fleet_link.chunks import Incoming, Outgoing
from fleet_link.errors import TrustError
from fleet_link.messages import AnyMessage, TransferOffer, TransferProgress, TransferReceipt
from fleet_link.part_file import file_sha256
from fleet_link.pki import Trust, load_identity
from fleet_link.topics import Channel, Direction, Topic, device_subscription, hub_subscription

BOX, HUB = "box-1", "hub"


@dataclass(frozen=True)
class EndConfig:
    role: str  # "send" (the box) or "receive" (the hub)
    folder: str  # certificates and keys
    port: int
    path: str  # file to send, or spool folder
    pace_s: float = 0.0  # the sender's pause after each chunk: time enough to be killed in the middle


class End:
    """Bus, envelope and replay window of one side."""

    def __init__(self, config: EndConfig) -> None:
        self.config = config
        sends = config.role == "send"
        self.name, self.peer = (BOX, HUB) if sends else (HUB, BOX)
        self.direction = Direction.UP if sends else Direction.DOWN
        folder = Path(config.folder)
        key, certificate = folder / f"{self.name}.key", folder / f"{self.name}.pem"
        self.identity = load_identity(key, certificate)
        self.trust = Trust((folder / "ca.pem").read_bytes())
        bus_config = BusConfig("localhost", config.port, self.name, folder / "ca.pem", certificate, key, keepalive_s=10)
        self.bus = Bus(bus_config, [device_subscription(BOX) if sends else hub_subscription()])
        self.sequence = envelope.Sequence(time.time, 0, lambda highest: None)
        self.window = envelope.ReplayWindow()
        self.bus.start()

    def say(self, message: AnyMessage) -> None:
        now = time.time()
        payload = envelope.seal(self.identity, self.peer, message, sequence=self.sequence.next(), now=now)
        self.bus.publish_message(Topic(self.direction, BOX, Channel.MESSAGE), payload)

    def hear(self, timeout_s: float) -> AnyMessage | bytes | None:
        """A verified message, the bytes of a chunk, or nothing."""
        received = self.bus.receive(timeout_s)
        if received is None or received.topic.channel is Channel.CHUNK:
            return received and received.payload
        try:
            opened = envelope.open(received.payload, self.trust, sender=self.peer, recipient=self.name, now=time.time())
            self.window.accept(opened.sequence, opened.digest)
        except envelope.ReplayError:
            return None
        return opened.message


def send(end: End) -> None:
    path = Path(end.config.path)
    name = chunks.transfer_id(kind="update", subject="round-1", sha256=file_sha256(path), sender=BOX)
    offer = chunks.new_offer(path, kind="update", subject="round-1", transfer_id=name, message_id=name)
    outgoing = Outgoing(path, offer)
    started_at = time.monotonic()
    while True:
        if outgoing.offer_due(time.monotonic()):
            end.say(offer)
        is_full = _publish_due(end, outgoing)
        match end.hear(0.001 if is_full else 0.02):
            case TransferProgress() as progress:
                outgoing.on_progress(progress, time.monotonic())
            case TransferReceipt(accepted=True):
                print("done", time.monotonic() - started_at, outgoing.bytes_sent, flush=True)
                return


def receive(end: End) -> None:
    incoming: Incoming | None = None
    while True:
        heard = end.hear(0.02)
        match heard:
            case TransferOffer() if incoming is None:
                incoming = Incoming.open(Path(end.config.path), heard, max_bytes=1024**3)
            case TransferOffer() if incoming:
                incoming.on_offer()
            case bytes() if incoming:
                incoming.on_chunk(heard)
        if incoming is None:
            continue
        name = incoming.offer.transfer_id
        if incoming.progress_due(time.monotonic()):
            print("progress", sum(byte.bit_count() for byte in incoming.bitmap), flush=True)
            end.say(TransferProgress(message_id=name, transfer_id=name, received_bitmap=incoming.bitmap))
        if incoming.complete:
            whole = _finish(incoming)
            if whole:
                end.say(TransferReceipt(message_id=name, transfer_id=name, accepted=True))
                print("done", whole, flush=True)
                _repeat_receipt(end, name)


def _publish_due(end: End, outgoing: Outgoing) -> bool:
    """True when the bus took no more."""
    for _, frame in outgoing.due(time.monotonic()):
        if not end.bus.publish_chunk(Topic(Direction.UP, BOX, Channel.CHUNK), frame):
            return True
        if end.config.pace_s:
            time.sleep(end.config.pace_s)
            return False
    return False


def _finish(incoming: Incoming) -> Path | None:
    try:
        return incoming.finish()
    except TrustError as error:
        print("refused", error, flush=True)
        return None


def _repeat_receipt(end: End, name: str) -> None:
    """Answer every further offer until the parent ends this process."""
    while True:
        if isinstance(end.hear(1.0), TransferOffer):
            end.say(TransferReceipt(message_id=name, transfer_id=name, accepted=True))


def main() -> None:
    end = End(EndConfig(**json.loads(sys.argv[1])))
    try:
        send(end) if end.config.role == "send" else receive(end)
    finally:
        end.bus.stop()


if __name__ == "__main__":
    main()
