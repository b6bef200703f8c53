"""The link: one thread that talks to the hub and turns messages into rows, rows into messages.

Reads messages from the bus and rows that other threads wrote; writes rounds, bundles, transfers and the outbox.
Never trains, installs or decides for the site: policy.py and rounds.py decide. With the hub away, all else goes on.
Source: ARCHITECTURE.md, "The link", "Rounds", "Releases".
"""

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event as StopEvent

from edge_agent import database, health, hub_change, invitations, ledger, masked, releases
from edge_agent.bundles import ActiveBundle
from edge_agent.config import Config, Hub
from edge_agent.hub_change import HIGHEST_SEQUENCE
from edge_agent.identity import Enrolled
from edge_agent.renewal import Proof
from edge_agent.rounds import Event
from edge_agent.transfers import Transfers
from fleet_link import envelope
from fleet_link.bus import Bus, BusConfig, Received
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import (
    Agreement,
    AnyMessage,
    Cohort,
    Receipt,
    ReleaseOffer,
    RoundClosed,
    RoundPlan,
    SharesForwarded,
    Survivors,
    TransferOffer,
    TransferProgress,
    TransferReceipt,
)
from fleet_link.topics import HUB, Channel, Direction, Topic, device_subscription

log = logging.getLogger(__name__)

IDLE_S = 0.1
BUSY_S = 0.02
MAX_TAKEN = 64  # messages before anything else gets its turn
HOUSEKEEPING_S = 0.1
RESEND_S = 5.0
KEPT_ALARMS = 8
ALARM_S = 3600.0  # distrust is told for so long
TROUBLE_S = 60.0  # the disk's trouble, which is tried again within that time
NEVER = float("-inf")
CONNECTED = "hub_connected"  # counter: 1 while the broker has us
SENT_SEQUENCE = "sent_sequence"  # counter: no higher one was given to a message of ours


def open_bus(enrolled: Enrolled, hub: Hub) -> Bus:
    """Not started yet."""
    files, address = enrolled.folder, enrolled.address.under(hub)
    config = BusConfig(
        host=address.mqtt_host,
        port=address.mqtt_port,
        name=enrolled.identity.name,
        ca_path=files.ca,
        certificate_path=files.certificate,
        key_path=files.key,
        key_passphrase=enrolled.passphrase,
    )
    return Bus(config, [device_subscription(enrolled.identity.name)])


@dataclass(frozen=True)
class Link:
    config: Config
    enrolled: Enrolled
    holder: ActiveBundle
    clock: Callable[[], float] = time.time
    wake_learner: Callable[[], object] = lambda: None

    def run(self, stop: StopEvent) -> None:
        """Until `stop` is set. What the hub or the site does wrong is logged and survived; our own defects are not."""
        db = database.connect(self.config.box.data_dir)
        bus = open_bus(self.enrolled, self.config.hub)
        conversation = Conversation(self, db, bus)
        proof = Proof(self.enrolled, lambda enrolled: open_bus(enrolled, self.config.hub), self.clock)
        bus.start()
        try:
            while not stop.is_set():
                conversation.step()
                conversation.renew(proof, stop)
        finally:
            bus.stop()
            conversation.close()
            db.close()


class Conversation:
    """One run of the link: database connection, bus and what lives only as long as they do."""

    def __init__(self, link: Link, db: sqlite3.Connection, bus: Bus) -> None:
        self._link = link
        self._data_dir = link.config.box.data_dir
        self._device = link.enrolled.identity.name
        self._db = db
        self._bus = bus
        reserved = database.counter(db, SENT_SEQUENCE)
        self._sequence = envelope.Sequence(
            link.clock, reserved, lambda highest: database.keep(db, SENT_SEQUENCE, highest)
        )
        self._window = envelope.ReplayWindow(database.counter(db, HIGHEST_SEQUENCE))
        self._transfers = Transfers(db, self._data_dir, self._say, self._send_chunk)
        self._alarms: dict[str, float] = {}  # text -> until when it is told
        self._sent_at: dict[str, float] = {}  # durable messages, by id
        self._counted: Counter[str] = Counter()  # bytes since the last look
        self._last_trouble = ""
        self._started_at = time.monotonic()
        self._housekeeping_at = NEVER
        self._heartbeat_at = NEVER
        self._told: object = None
        self._was_connected = False
        database.keep(db, CONNECTED, 0)
        self._transfers.repair(link.clock())

    def step(self) -> None:
        """Wait a moment for a message; then do what is due."""
        timeout_s = BUSY_S if self._transfers.is_flowing else IDLE_S
        for _ in range(MAX_TAKEN):
            received = self._bus.receive(timeout_s)
            if received is None:
                break
            self._guarded(self._take, received)
            timeout_s = 0
        now = self._link.clock()
        if time.monotonic() - self._housekeeping_at >= HOUSEKEEPING_S:
            self._housekeeping_at = time.monotonic()
            self._keep_house(now)
        self._guarded(self._transfers.receive_due, now)
        if self._bus.connected:
            self._guarded(self._transfers.send_due)

    def renew(self, proof: Proof, stop: StopEvent) -> None:
        """Where the next certificate waits: go on with it once a connection has proved it."""
        self._guarded(self._renew, proof, stop)

    def _renew(self, proof: Proof, stop: StopEvent) -> None:
        if proof.try_waiting(self._db, self._bus, stop):
            hub_change.follow(self._db, self._data_dir, self._link.enrolled, self._link.clock())

    def close(self) -> None:
        self._transfers.close()
        self._keep_counts()
        database.keep(self._db, CONNECTED, 0)

    # --- from the hub ---------------------------------------------------------------------------------

    def _take(self, received: Received) -> None:
        self._counted["bytes_received"] += len(received.payload)
        if received.topic.channel is Channel.CHUNK:
            self._transfers.on_chunk(received.payload)
            return
        now = self._link.clock()
        opened = envelope.open(received.payload, self._link.enrolled.trust, sender=HUB, recipient=self._device, now=now)
        self._window.accept(opened.sequence, opened.digest)
        database.keep(self._db, HIGHEST_SEQUENCE, self._window.highest)
        self._dispatch(opened.message, now)
        if isinstance(opened.message, RoundPlan | masked.FromHub):
            self._housekeeping_at = NEVER  # the answer leaves in this very step
            self._link.wake_learner()

    def _dispatch(self, message: AnyMessage, now: float) -> None:
        match message:
            case RoundPlan():
                invitations.take(self._db, self._link.config, self._link.enrolled.identity, message, now)
            case Cohort() | SharesForwarded() | Survivors() | Agreement():
                masked.take(self._db, self._data_dir, self._link.enrolled, message, now)
            case RoundClosed():
                event = Event.CLOSED_BY_HUB if message.outcome == "released" else Event.LEFT_OUT
                outcome = ledger.Outcome(reason=message.reason or None)
                ledger.apply(self._db, self._data_dir, message.round_id, event, now, outcome)
            case ReleaseOffer():
                request = releases.take_offer(self._db, self._link.enrolled.folder, message, now)
                if request is not None:
                    self._say(request)
            case TransferOffer():
                self._transfers.on_offer(message)
            case TransferProgress():
                self._transfers.on_progress(message)
            case TransferReceipt():
                self._transfers.on_receipt(message, now)
            case Receipt():
                self._on_receipt(message)
            case _:
                raise LinkError(f"the hub sent a {type(message).__name__}, which only a box says")

    def _on_receipt(self, receipt: Receipt) -> None:
        """Either way the hub has it on its disk; what it refuses would not get better by saying it again."""
        if ledger.received(self._db, receipt.of) and not receipt.accepted:
            log.warning("the hub does not accept a message: %s", receipt.reason)
        self._sent_at.pop(receipt.of, None)

    # --- to the hub -----------------------------------------------------------------------------------

    def _keep_house(self, now: float) -> None:
        """Several times a second: the clock's events, rows of other threads, durable messages, heartbeat.

        Each is guarded by itself: a bad file or row must not silence the heartbeat.
        """
        self._guarded(invitations.judge_waiting, self._db, self._link.config, self._link.enrolled.identity, now)
        self._guarded(invitations.close_expired, self._db, self._data_dir, now)
        self._guarded(self._transfers.load_outgoing, now)
        if database.has_to_forget(self._db):
            self._guarded(database.forget_on_disk, self._db)
        self._keep_counts()
        if self._bus.connected is not self._was_connected:
            self._was_connected = self._bus.connected
            database.keep(self._db, CONNECTED, int(self._was_connected))
            self._sent_at.clear()
            self._heartbeat_at = NEVER
        if self._was_connected:
            self._guarded(self._send_durable)
            self._guarded(self._send_heartbeat)

    def _send_durable(self) -> None:
        moment = time.monotonic()
        for message in ledger.pending(self._db):
            if moment - self._sent_at.get(message.message_id, NEVER) >= RESEND_S:
                self._sent_at[message.message_id] = moment
                self._say(message)

    def _send_heartbeat(self) -> None:
        """On time, and at once when something that the hub acts upon has changed."""
        active = self._link.holder.current
        link = self._link
        own, ends = self._current_alarms(), health.certificate_notices(link.enrolled.life, link.clock())
        troubles = (*own, *ends, *database.alarms(self._db), *database.notices(self._db))
        tells = (active.digest, active.release_version, health.round_statuses(self._db), troubles)
        moment = time.monotonic()
        if tells == self._told and moment - self._heartbeat_at < self._link.config.hub.heartbeat_s:
            return
        self._told, self._heartbeat_at = tells, moment
        self._say(health.heartbeat(self._db, link.config, active, moment - self._started_at, own, ends))

    def _say(self, message: AnyMessage) -> None:
        """Lost while the hub is away: whatever matters is said again."""
        link = self._link
        sealed = envelope.seal(link.enrolled.identity, HUB, message, sequence=self._sequence.next(), now=link.clock())
        if self._bus.publish_message(Topic(Direction.UP, self._device, Channel.MESSAGE), sealed):
            self._counted["bytes_sent"] += len(sealed)

    def _send_chunk(self, frame: bytes) -> bool:
        if not self._bus.publish_chunk(Topic(Direction.UP, self._device, Channel.CHUNK), frame):
            return False
        self._counted["bytes_sent"] += len(frame)
        return True

    def _keep_counts(self) -> None:
        """Of messages and chunks, without MQTT and TLS."""
        for name, amount in self._counted.items():
            database.count(self._db, name, amount)
        self._counted.clear()

    # --- what goes wrong ------------------------------------------------------------------------------

    def _guarded(self, step: Callable[..., object], *arguments: object) -> None:
        """Log and go on: the hub says everything that matters again. Distrust and this site's trouble are also alarms."""
        try:
            step(*arguments)
        except envelope.ReplayError as error:
            log.info("message dropped: %s", error)  # MQTT repeats after a reconnect
        except TrustError as error:
            log.error("refused: %s (%s)", error, error.advice)
            self._alarms[str(error)] = time.monotonic() + ALARM_S
        except SiteError as error:
            if str(error) not in self._alarms:
                log.warning("%s (%s)", error, error.advice)
            self._alarms[str(error)] = time.monotonic() + TROUBLE_S
        except LinkError as error:
            if str(error) != self._last_trouble:
                log.warning("%s (%s)", error, error.advice)
            self._last_trouble = str(error)

    def _current_alarms(self) -> list[str]:
        """The link's own: forgotten after a while of quiet."""
        moment = time.monotonic()
        self._alarms = {text: until for text, until in self._alarms.items() if until > moment}
        return list(self._alarms)[-KEPT_ALARMS:]
