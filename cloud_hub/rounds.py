"""A round as a table of states: what has happened, what follows, what must be done next.

Reads and writes nothing; `ledger` loads a Round from the database and stores what `advance` gives.
Never does I/O, reads a clock or forgets an event: late and repeated events leave the round as it is.
Source: ARCHITECTURE.md, "Rounds".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Beside each state the facts that make it true."""

    INVITED = "invited"  # plan stored, no device has joined
    TRAINING = "training"  # at least one device has joined, no update is counted
    UPLOADING = "uploading"  # at least one update was counted, more may come
    SUMMED = "summed"  # enough updates counted, no further one is taken
    EVALUATED = "evaluated"  # candidate bundle on disk; parity and known answer passed
    RELEASED = "released"  # candidate signed and published
    DROPPED = "dropped"  # nothing came of it; `reason` says why


class Member(StrEnum):
    """Where one invited device stands, as the hub knows it."""

    INVITED = "invited"  # plan stored, no answer
    JOINED = "joined"  # answered yes; update awaited
    DECLINED = "declined"  # answered no, at once or because its training failed; the reason is kept
    DELIVERED = "delivered"  # its update is on our disk, verified and counted once
    REFUSED = "refused"  # its update was refused, or the device was revoked


class Command(StrEnum):
    """What the state demands. Each may be carried out twice."""

    BUILD = "build"
    PUBLISH = "publish"
    CLOSE = "close"


@dataclass(frozen=True)
class Round:
    state: State
    deadline_unix_s: float
    min_devices: int
    members: Mapping[str, Member]
    revoked: frozenset[str] = frozenset()  # devices; until the sum is closed they count for nothing
    candidate_digest: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Answered:
    device: str
    joins: bool


@dataclass(frozen=True)
class Delivered:
    device: str


@dataclass(frozen=True)
class Refused:
    device: str


@dataclass(frozen=True)
class Tick:
    """Nothing happened but time."""


@dataclass(frozen=True)
class CandidateReady:
    digest: str


@dataclass(frozen=True)
class Failed:
    """What no further waiting repairs: export, parity, a counted file that is lost; or the operator's word."""

    reason: str


@dataclass(frozen=True)
class Published:
    pass


DeviceEvent = Answered | Delivered | Refused
Event = DeviceEvent | Tick | CandidateReady | Failed | Published

COLLECTING = (State.INVITED, State.TRAINING, State.UPLOADING)
FINISHED = (State.RELEASED, State.DROPPED)

_AFTER: Mapping[tuple[State, type[Event]], State] = MappingProxyType(
    {
        (State.SUMMED, CandidateReady): State.EVALUATED,
        (State.EVALUATED, Published): State.RELEASED,
    }
)
_MEMBER_AFTER: Mapping[tuple[Member, type[DeviceEvent]], Member] = MappingProxyType(
    {
        (Member.INVITED, Answered): Member.JOINED,
        (Member.INVITED, Refused): Member.REFUSED,
        (Member.JOINED, Delivered): Member.DELIVERED,
        (Member.JOINED, Refused): Member.REFUSED,
    }
)
_DUE: Mapping[State, tuple[Command, ...]] = MappingProxyType(
    {
        State.SUMMED: (Command.BUILD,),
        State.EVALUATED: (Command.PUBLISH,),
        State.RELEASED: (Command.CLOSE,),
        State.DROPPED: (Command.CLOSE,),
    }
)


def advance(before: Round, event: Event, now: float) -> tuple[Round, tuple[Command, ...]]:
    """Give the round after `event` and the commands its state demands, again and again until it is left."""
    if before.state in FINISHED:
        after = before
    elif isinstance(event, Failed):
        after = replace(before, state=State.DROPPED, reason=event.reason)
    elif before.state in COLLECTING:
        after = _collect(before, event, now)
    else:
        after = _conclude(before, event)
    return after, commands(after.state)


def commands(state: State) -> tuple[Command, ...]:
    """What the state demands; after a restart the same as before it."""
    return _DUE.get(state, ())


def awaited(members: Mapping[str, Member]) -> tuple[str, ...]:
    """Devices that may still deliver."""
    return tuple(device for device, member in members.items() if member in (Member.INVITED, Member.JOINED))


def delivered(members: Mapping[str, Member]) -> tuple[str, ...]:
    return tuple(device for device, member in members.items() if member is Member.DELIVERED)


def _collect(before: Round, event: Event, now: float) -> Round:
    members = _without(before.revoked, _with_event(before.members, event))
    after = replace(before, members=members, state=_collecting_state(before.state, members))
    count, open_ = len(delivered(members)), len(awaited(members))
    if open_ and now < before.deadline_unix_s and count + open_ >= before.min_devices:
        return after
    if count >= before.min_devices:
        return replace(after, state=State.SUMMED)
    why = "at the deadline" if now >= before.deadline_unix_s else f"and {open_} may still deliver"
    reason = f"{count} of {len(members)} invited devices delivered {why}; {before.min_devices} are needed"
    return replace(after, state=State.DROPPED, reason=reason)


def _with_event(members: Mapping[str, Member], event: Event) -> Mapping[str, Member]:
    if not isinstance(event, Answered | Delivered | Refused) or event.device not in members:
        return members
    member = members[event.device]
    new = _MEMBER_AFTER.get((member, type(event)), member)
    if isinstance(event, Answered) and not event.joins and member in (Member.INVITED, Member.JOINED):
        new = Member.DECLINED
    return {**members, event.device: new}


def _without(revoked: frozenset[str], members: Mapping[str, Member]) -> Mapping[str, Member]:
    """What a revoked device gave, or may still give, is taken out."""
    out = revoked & {*awaited(members), *delivered(members)}
    return {device: Member.REFUSED if device in out else member for device, member in members.items()}


def _collecting_state(before: State, members: Mapping[str, Member]) -> State:
    """The furthest state whose fact holds; a round never goes back."""
    reached = before
    if reached is State.INVITED and Member.JOINED in members.values():
        reached = State.TRAINING
    if Member.DELIVERED in members.values():
        reached = State.UPLOADING
    return reached


def _conclude(before: Round, event: Event) -> Round:
    state = _AFTER.get((before.state, type(event)), before.state)
    if isinstance(event, CandidateReady):
        return replace(before, state=state, candidate_digest=event.digest)
    return replace(before, state=state)
