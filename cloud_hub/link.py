"""The hub's end of the link: who may speak, what was said, what each box is missing.

Reads messages from the bus; writes heartbeats, sequences and refusals; hands rounds, releases and transfers to their owners.
Never trusts a topic without the signature, a signature without the registry, or a message twice.
Source: ARCHITECTURE.md, "The link", "Rounds", "Releases".
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from cloud_hub import masked, registry
from cloud_hub.config import Config
from cloud_hub.database import Counter, Database, Device, Round, RoundDevice, counter, record_refusal
from cloud_hub.distribution import Distribution
from cloud_hub.intake import Came, Intake
from cloud_hub.ledger import active_round, plan_of
from cloud_hub.releases import Release, Repository
from cloud_hub.rounds import COLLECTING, FINISHED, Member, State
from cloud_hub.transfers import Transfers
from fleet_link import envelope
from fleet_link.bus import Bus, BusConfig, Received
from fleet_link.errors import LinkError, SiteError, TrustError, WardroundError
from fleet_link.messages import (
    AnyMessage,
    BundleRequest,
    Heartbeat,
    Receipt,
    ReleaseReport,
    RoundAnswer,
    RoundClosed,
    RoundKeys,
    RoundStatus,
    Shares,
    SurvivorsSigned,
    TransferOffer,
    TransferProgress,
    TransferReceipt,
    Unmask,
)
from fleet_link.pki import Identity, Trust
from fleet_link.topics import HUB, Channel, Direction, Topic, hub_subscription

log = logging.getLogger(__name__)

IDLE_S = 0.1
BUSY_S = 0.02
MAX_TAKEN = 256  # messages before anything else gets its turn
QUEUED_MAX = 4 * MAX_TAKEN  # on the way out: the receipts of one turn leave room for what a stage says
AT_ONCE = 0.0  # when to tell a device what it has not been told yet
PATIENCE_S = 30.0  # while messages wait here, nothing is said a second time for so long: the answer may be among them
_COUNTED = ("delivered", "agreed", "unmasked")  # states of a box whose update the hub has acknowledged
SENT_SEQUENCE = "sent_sequence"  # counter: no higher one was given to a message of ours


def open_bus(config: Config) -> Bus:
    """Not started yet. The broker is our child on this machine."""
    paths = config.paths
    bus_config = BusConfig(
        host=config.broker_here,
        port=config.broker.port,
        name=HUB,
        ca_path=paths.ca_certificate,
        certificate_path=paths.hub_certificate,
        key_path=paths.hub_key,
        keepalive_s=config.broker.keepalive_s,
        queued_messages_max=QUEUED_MAX,
    )
    return Bus(bus_config, [hub_subscription()])


@dataclass(frozen=True)
class Parts:
    """What the link works with, put together by the service."""

    config: Config
    database: Database
    bus: Bus
    identity: Identity
    trust: Trust
    intake: Intake
    distribution: Distribution
    repository: Repository
    clock: Callable[[], float]


class Link:
    """Owned by the hub's loop: `step` takes what came and sends what is due, `reconcile_all` when something is new."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._identity = parts.identity
        with parts.database.reading() as session:
            self._sequence = envelope.Sequence(parts.clock, counter(session, SENT_SEQUENCE), self._reserve)
        self._windows: dict[
            str, envelope.ReplayWindow
        ] = {}  # by device: a box counts on when it renews its certificate
        self._owed: dict[str, float] = {}  # device -> when to tell it again what it is missing
        self._transfers = Transfers(parts.config, parts.database, parts.intake, self._say, self._send_chunk)
        self._news = True  # facts that a rollout depends on have changed
        self._last_trouble = ""

    def step(self) -> None:
        """Wait a moment for messages; then do what is due."""
        is_behind = self._take_waiting()
        now = self._parts.clock()
        self._trying(self._transfers.receive_due, now)
        if self._parts.intake.has_moved():
            self._transfers.drop_unwanted(now)
            self._owe_everybody(now)
        if self._parts.bus.connected:
            self._trying(lambda _: self._transfers.send_due(), now)
            self._reconcile_due(now, PATIENCE_S if is_behind else 0.0)

    def tick(self, round_news: bool) -> None:
        """Every loop_s: rollout decisions; `round_news` when a round began or ended."""
        now = self._parts.clock()
        if round_news:
            self._transfers.drop_unwanted(now)
            self._owe_everybody(now)
        if self._news or round_news:
            self._news = True  # until the decision is made, whatever goes wrong in it
            for device in self._parts.distribution.decide(now):
                self._owed[device] = AT_ONCE
            self._news = False

    def use_identity(self, identity: Identity) -> None:
        """Go on with another certificate of the hub: signed and connected with it from now on. The same again is nothing."""
        if identity.certificate_der == self._identity.certificate_der:
            return
        self._parts.bus.stop()
        self._parts.bus.start()
        self._identity = identity
        log.info("the link goes on with the hub's new certificate")

    def close(self) -> None:
        self._transfers.close()

    # --- from the boxes -------------------------------------------------------------------------------

    def _take_waiting(self) -> bool:
        """True when there are more than get their turn now."""
        timeout_s = BUSY_S if self._transfers.is_flowing else IDLE_S
        for _ in range(MAX_TAKEN):
            received = self._parts.bus.receive(timeout_s)
            if received is None:
                return False
            self.take(received)
            timeout_s = 0
        return True

    def take(self, received: Received) -> None:
        """One message or chunk. What is wrong with it is a refusal that the operator can see, never more."""
        device, now = received.topic.device, self._parts.clock()
        if received.topic.direction is not Direction.UP:
            return
        try:
            if received.topic.channel is Channel.CHUNK:
                self._transfers.on_chunk(device, received.payload)
            else:
                self._take_message(device, received.payload, now)
        except envelope.RepeatError as error:
            log.info("device %s: message dropped: %s", device, error)
        except (TrustError, LinkError) as error:
            self._refused(device, error, now)
        except SiteError as error:
            self._trouble(error)

    def _take_message(self, device: str, payload: bytes, now: float) -> None:
        with self._parts.database.reading() as session:
            # 1. The registry: known and not revoked.
            row = session.get(Device, device)
            if row is None or row.revoked_at is not None:
                raise TrustError(
                    "a revoked device still speaks" if row is not None else "no such device in the registry",
                    advice="fleet devices shows all",
                )
            # 2. Certificate, signature, sender, recipient, time.
            opened = envelope.open(payload, self._parts.trust, sender=device, recipient=HUB, now=now)
            # 3. The certificate still counts. Before the window: an old one must not use up sequences.
            registry.check_certificate(session, device, opened.serial)
        # 4. Not seen before; kept on disk before anything comes of it, in one transaction with whatever does.
        window = self._windows.get(device)
        if window is None or window.highest > row.last_sequence:  # enrolled anew since: it counts anew
            window = self._windows[device] = envelope.ReplayWindow(row.last_sequence)
        window.accept(opened.sequence, opened.digest)
        highest = window.highest

        def came(session: Session) -> None:
            session.execute(update(Device).where(Device.device == device).values(last_sequence=highest))

        self._dispatch(device, opened.message, now, came)

    def _dispatch(self, device: str, message: AnyMessage, now: float, came: Came) -> None:
        match message:
            case Heartbeat():
                with self._parts.database.writing() as session:
                    came(session)
                    _keep_heartbeat(session.get_one(Device, device), message, now)
                self._news = True
                self._owed.setdefault(device, now)
            case RoundAnswer():
                self._receipt(device, message.message_id, self._parts.intake.answered(device, message, now, came))
            case RoundKeys() | Shares() | SurvivorsSigned() | Unmask():
                self._receipt(device, message.message_id, self._parts.intake.took(device, message, now, came))
            case _:
                with self._parts.database.writing() as session:
                    came(session)
                self._dispatch_other(device, message, now)

    def _dispatch_other(self, device: str, message: AnyMessage, now: float) -> None:
        match message:
            case ReleaseReport():
                self._receipt(device, message.message_id, self._parts.distribution.reported(device, message, now))
                self._news = True
            case BundleRequest():
                self._on_bundle_request(device, message, now)
            case TransferOffer():
                self._transfers.on_offer(device, message, now)
            case TransferProgress():
                self._transfers.on_progress(device, message, now)
            case TransferReceipt():
                self._transfers.on_receipt(device, message, now)
            case _:
                raise LinkError(f"a box sent a {type(message).__name__}, which only the hub says")

    def _on_bundle_request(self, device: str, request: BundleRequest, now: float) -> None:
        offered = self._parts.distribution.offers.get(device)
        if offered is None or offered.bundle_digest != request.bundle_digest:
            raise LinkError(f"bundle {request.bundle_digest[:12]} is not offered to {device}")
        if self._transfers.is_sending(device, request.bundle_digest):  # it asks again while it receives
            return
        path = self._parts.repository.bundle_path(request.bundle_digest)
        self._transfers.send_bundle(device, request.bundle_digest, path, now)

    # --- what a box is missing ------------------------------------------------------------------------

    def _owe_everybody(self, now: float) -> None:
        since = now - self._parts.config.rollout.heartbeat_max_age_s
        with self._parts.database.reading() as session:
            recent = session.scalars(
                select(Device.device).where(Device.last_seen_at > since, Device.revoked_at.is_(None))
            ).all()
        self._owed.update(dict.fromkeys(recent, AT_ONCE))

    def _reconcile_due(self, now: float, patience_s: float) -> None:
        resend_s = self._parts.config.rollout.resend_s
        # Due later than a resend away: the clock went back.
        for device in [d for d, due_at in self._owed.items() if not -patience_s < due_at - now <= resend_s]:
            missing = self._missing(device, now)
            if not all(self._publish(device, message) for message in missing):
                return  # the way out is full: the next step goes on here
            if missing:
                self._owed[device] = now + resend_s
            else:
                del self._owed[device]

    def _missing(self, device: str, now: float) -> list[AnyMessage]:
        """Plan, end of a round, release: whatever its last heartbeat shows that it lacks. Nothing for one long silent."""
        with self._parts.database.reading() as session:
            row = session.get(Device, device)
            if row is None or row.heartbeat is None or row.last_seen_at is None or row.revoked_at is not None:
                return []
            if now - row.last_seen_at > self._parts.config.rollout.heartbeat_max_age_s:
                return []
            statuses = {s.round_id: s for s in msgspec.json.decode(row.heartbeat, type=Heartbeat).rounds}
            active = active_round(session)
            part = session.get(RoundDevice, (active.round_id, device)) if active is not None else None
            known = {r: session.get(Round, r) for r in statuses}
            whys = {r: _why_in_no_sum(session, r, device) for r in statuses}
            missing: list[AnyMessage] = []
            if active is not None and part is not None:
                missing += _of_round(session, active, part, statuses.get(active.round_id))
        missing += [_closed(r, row, whys[r]) for r, row in known.items() if _lacks_end(row, statuses[r])]
        offered = self._parts.distribution.offers.get(device)
        if offered is not None:
            release = Release(offered.release_version, offered.bundle_digest, offered.size, offered.round_id or "")
            missing.append(self._parts.repository.offer(release, message_id=_id()))
        return missing

    # --- to the boxes ---------------------------------------------------------------------------------

    def _receipt(self, device: str, of: str, verdict: tuple[bool, str]) -> None:
        """Given after the commit: what is acknowledged is on our disk."""
        accepted, reason = verdict
        self._say(device, Receipt(message_id=_id(), of=of, accepted=accepted, reason=reason[:500]))

    def _say(self, device: str, message: AnyMessage) -> None:
        """Lost while a box is away or the way out is full: whatever matters is said again."""
        self._publish(device, message)

    def _publish(self, device: str, message: AnyMessage) -> bool:
        """False when the bus does not take it now."""
        parts = self._parts
        sealed = envelope.seal(self._identity, device, message, sequence=self._sequence.next(), now=parts.clock())
        return parts.bus.publish_message(Topic(Direction.DOWN, device, Channel.MESSAGE), sealed)

    def _reserve(self, highest: int) -> None:
        with self._parts.database.writing() as session:
            session.merge(Counter(name=SENT_SEQUENCE, value=highest))

    def _send_chunk(self, device: str, frame: bytes) -> bool:
        return self._parts.bus.publish_chunk(Topic(Direction.DOWN, device, Channel.CHUNK), frame)

    # --- what goes wrong ------------------------------------------------------------------------------

    def _trying(self, step: Callable[[float], None], now: float) -> None:
        try:
            step(now)
        except WardroundError as error:
            self._trouble(error)

    def _refused(self, device: str, error: WardroundError, now: float) -> None:
        log.warning("device %s: refused: %s", device, error)
        with self._parts.database.writing() as session:
            record_refusal(session, device=device, what="message", reason=str(error), now=now)

    def _trouble(self, error: WardroundError) -> None:
        """Disk or configuration: said once, tried again."""
        if str(error) != self._last_trouble:
            log.error("%s (%s)", error, error.advice)
        self._last_trouble = str(error)


def _keep_heartbeat(row: Device, heartbeat: Heartbeat, now: float) -> None:
    if row.last_seen_at is None:
        log.info("device %s: first heartbeat", row.device)
    row.last_seen_at, row.heartbeat = now, msgspec.json.encode(heartbeat).decode()


def _of_round(session: Session, active: Round, part: RoundDevice, status: RoundStatus | None) -> list[AnyMessage]:
    """The plan, what the stage of a masked round has to say, or that it goes on without this box."""
    if _lacks_plan(active, part, status):
        return [plan_of(active)]
    if part.state == Member.LEFT and status is not None and status.state not in ("closed", "declined"):
        return [_dropped(active.round_id, part.reason)]
    if part.state == Member.SHARED and status is not None and status.state in ("training", "uploading"):
        return []  # it has heard whom to mask against, and is at it
    owed = masked.owed(session, active.round_id, State(active.state), part.device, Member(part.state), _id())
    return [owed] if owed is not None else []


def _lacks_plan(active: Round, part: RoundDevice, status: RoundStatus | None) -> bool:
    """Not answered; or joined, but its box has lost the round, or has delivered what a restored hub has lost."""
    if State(active.state) not in COLLECTING:
        return False
    if part.state == Member.SHARED:  # masked: the box offers its update again
        return status is not None and status.state in _COUNTED
    return part.state == Member.INVITED or (
        part.state == Member.JOINED and (status is None or status.state == "delivered")
    )


def _lacks_end(row: Round | None, status: RoundStatus) -> bool:
    return status.state != "closed" and (row is None or State(row.state) in FINISHED)


def _why_in_no_sum(session: Session, round_id: str, device: str) -> str:
    """Nothing of the device is in what the round released, or "" where it is."""
    part = session.get(RoundDevice, (round_id, device))
    if part is not None and part.state == Member.LEFT and part.counted_at is None:
        return part.reason
    return masked.why_ended(session, round_id, device)


def _closed(round_id: str, row: Round | None, why_in_no_sum: str) -> RoundClosed:
    """To a box whose update is in no sum the round is dropped: what it learned from is not learned yet."""
    if row is None:
        return _dropped(round_id, "the hub has no such round")
    if why_in_no_sum:
        return _dropped(round_id, why_in_no_sum)
    if row.state == State.RELEASED:
        return RoundClosed(message_id=_id(), round_id=round_id, outcome="released")
    return _dropped(round_id, row.reason)


def _dropped(round_id: str, reason: str) -> RoundClosed:
    return RoundClosed(message_id=_id(), round_id=round_id, outcome="dropped", reason=reason)


def _id() -> str:
    return secrets.token_hex(16)
