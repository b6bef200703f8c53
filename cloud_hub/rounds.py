"""A round as a table of states: what has happened, what follows, what must be done next.

Reads and writes nothing; `ledger` loads a Round from the database and stores what `advance` gives.
Never does I/O, reads a clock or forgets an event: late and repeated events leave the round as it is.
Source: ARCHITECTURE.md, "Rounds"; the stages of a masked round: Bonawitz et al. 2017, figure 4; buffered rounds: Nguyen et
al. 2022 (FedBuff), masked as in Huba et al. 2022 (Papaya): the buffer is the cohort.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Beside each state the facts that make it true."""

    INVITED = "invited"  # plan stored, no device has joined (masked: sent its keys)
    KEYS = "keys"  # masked: at least one device has sent its keys
    SHARING = "sharing"  # masked: the cohort is stored; its devices share their secrets
    TRAINING = "training"  # at least one device has joined (masked: who shared is stored), no update is counted
    UPLOADING = "uploading"  # at least one update was counted, more may come
    AGREEING = "agreeing"  # masked: whose update is in the sum is stored, and told; these sign it
    UNMASKING = "unmasking"  # masked: enough have signed; these give the shares that take the masks off
    SUMMED = "summed"  # enough updates counted (masked: and enough shares given), no further one is taken
    EVALUATED = "evaluated"  # candidate bundle on disk; parity and known answer passed
    RELEASED = "released"  # candidate signed and published
    DROPPED = "dropped"  # nothing came of it; `reason` says why


class Member(StrEnum):
    """Where one invited device stands, as the hub knows it."""

    INVITED = "invited"  # plan stored, no answer
    JOINED = "joined"  # answered yes; update awaited (masked: its keys)
    KEYED = "keyed"  # masked: its keys are on our disk
    SHARED = "shared"  # masked: its shares are on our disk; update awaited
    DELIVERED = "delivered"  # its update is on our disk, verified and counted once
    AGREED = "agreed"  # masked: it has signed whose updates are in the sum
    UNMASKED = "unmasked"  # masked: it has given the shares asked for
    DECLINED = "declined"  # answered no, at once or because its training failed; the reason is kept
    LEFT = "left"  # masked: gives no more, by its own word or because a stage ended without it; the reason is kept.
    # Buffered: the sum was closed without its update, which a later round may have
    REFUSED = "refused"  # its update was refused, or the device was revoked


class Command(StrEnum):
    """What the state demands. Each may be carried out twice."""

    BUILD = "build"
    PUBLISH = "publish"
    CLOSE = "close"


@dataclass(frozen=True)
class Masked:
    """What only a masked round has."""

    stage_at: float  # when its state was entered
    stage_s: float  # so long a stage waits that is not the training
    active: frozenset[str] = frozenset()  # devices whose update is in the one sum: told to all, so it cannot be undone


@dataclass(frozen=True)
class Buffer:
    """What only a buffered round has: it goes on with the first `size` updates, and waits for nobody else."""

    size: int
    until: float  # masked: with fewer from then on, as many as may be; the stages that follow need the time left


@dataclass(frozen=True)
class Round:
    state: State
    deadline_unix_s: float
    min_devices: int
    members: Mapping[str, Member]
    revoked: frozenset[str] = frozenset()  # devices; until the sum is closed they count for nothing
    candidate_digest: str = ""
    reason: str = ""
    masked: Masked | None = None
    buffer: Buffer | None = None


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
class Keyed:
    device: str


@dataclass(frozen=True)
class Shared:
    device: str


@dataclass(frozen=True)
class Signed:
    device: str


@dataclass(frozen=True)
class Unmasked:
    device: str


@dataclass(frozen=True)
class Settled:
    """The stage `of` a masked round is over, and secure_sum could go on with `staying`, which is stored.

    Once the survivors are told these are all in the sums that go on, whether they answer or not.
    """

    of: State
    staying: frozenset[str]


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


DeviceEvent = Answered | Keyed | Shared | Delivered | Signed | Unmasked | Refused
Event = DeviceEvent | Settled | Tick | CandidateReady | Failed | Published

COLLECTING = (State.INVITED, State.KEYS, State.SHARING, State.TRAINING, State.UPLOADING)
FINISHED = (State.RELEASED, State.DROPPED)


@dataclass(frozen=True)
class Stage:
    """What one state of a masked round waits for."""

    event: type[DeviceEvent]
    waits_for: tuple[Member, ...]
    arrived: Member
    then: State
    what: str  # of one device, in a reason


_KEYS = Stage(Keyed, (Member.INVITED, Member.JOINED), Member.KEYED, State.SHARING, "keys")
_UPDATES = Stage(Delivered, (Member.SHARED,), Member.DELIVERED, State.AGREEING, "an update")
STAGES: Mapping[State, Stage] = MappingProxyType(
    {
        State.INVITED: _KEYS,
        State.KEYS: _KEYS,
        State.SHARING: Stage(Shared, (Member.KEYED,), Member.SHARED, State.TRAINING, "shares"),
        State.TRAINING: _UPDATES,
        State.UPLOADING: _UPDATES,
        State.AGREEING: Stage(Signed, (Member.DELIVERED,), Member.AGREED, State.UNMASKING, "a signature"),
        State.UNMASKING: Stage(Unmasked, (Member.AGREED,), Member.UNMASKED, State.SUMMED, "unmasking shares"),
    }
)
_BY_THE_DEADLINE = (State.INVITED, State.TRAINING, State.UPLOADING)  # the others: stage_s after they began
FILLING = (State.INVITED, State.KEYS)  # masked: its keys are a box's word that its update is ready
_FIRST_ARRIVAL: Mapping[State, State] = MappingProxyType({State.INVITED: State.KEYS, State.TRAINING: State.UPLOADING})
_GAVE_NO_SECRET = (Member.INVITED, Member.JOINED, Member.KEYED)
_GAVE_SECRETS = (Member.SHARED, Member.DELIVERED, Member.AGREED)
_IN_THE_SUM = (Member.DELIVERED, Member.AGREED, Member.UNMASKED)

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
    elif before.masked is not None and before.state in STAGES:
        after = _stage(before, before.masked, event, now)
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
    is_full = before.buffer is not None and count >= before.buffer.size
    if not is_full and open_ and now < before.deadline_unix_s and count + open_ >= before.min_devices:
        return after
    if count >= before.min_devices:
        return replace(after, state=State.SUMMED, members=_without_late(members) if before.buffer else members)
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


def _without_late(members: Mapping[str, Member]) -> Mapping[str, Member]:
    """Their updates are no part of the sum, and they hear so: a later round may have them."""
    late = awaited(members)
    return {device: Member.LEFT if device in late else member for device, member in members.items()}


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


# --- masked rounds --------------------------------------------------------------------------------


def is_stage_over(round_: Round, now: float) -> bool:
    """Whether secure_sum is to settle who goes on: everybody has answered, or the time is up."""
    stage = STAGES.get(round_.state)
    if round_.masked is None or stage is None:
        return False
    if is_full(round_):
        return True
    return now >= stage_ends_at(round_) or not any(member in stage.waits_for for member in round_.members.values())


def is_full(round_: Round) -> bool:
    """Whether the keys of as many boxes are here as a masked round's buffer has room for."""
    if round_.buffer is None or round_.state not in FILLING:
        return False
    return list(round_.members.values()).count(Member.KEYED) >= round_.buffer.size


def stage_ends_at(round_: Round) -> float:
    if round_.masked is not None and round_.buffer is not None and round_.state in FILLING:
        return max(round_.buffer.until, round_.masked.stage_at + round_.masked.stage_s)
    if round_.masked is None or round_.state in _BY_THE_DEADLINE:
        return round_.deadline_unix_s
    return round_.masked.stage_at + round_.masked.stage_s if round_.state in STAGES else math.inf


def expects(state: State, member: Member, event: type[DeviceEvent]) -> bool:
    """Whether a masked round in `state` takes this from such a device now."""
    stage = STAGES.get(state)
    return stage is not None and stage.event is event and member in stage.waits_for


def _stage(before: Round, masked: Masked, event: Event, now: float) -> Round:
    if isinstance(event, Settled):
        after = _settled(before, masked, event)
    else:
        members = _taken_out(before, _with_stage_event(before.state, before.members, event))
        state = before.state
        if STAGES[state].arrived in members.values():
            state = _FIRST_ARRIVAL.get(state, state)
        after = replace(before, members=members, state=state)
    if gone := before.revoked & masked.active:
        reason = (
            f"{', '.join(sorted(gone))} was revoked after its masked update went into the sum: it cannot be taken out"
        )
        return replace(after, state=State.DROPPED, reason=reason)
    if after.state in COLLECTING and (reason := _too_few(after)):
        return replace(after, state=State.DROPPED, reason=reason)
    if after.state is not before.state and after.masked is not None:
        after = replace(after, masked=replace(after.masked, stage_at=now))
    return after


def _with_stage_event(state: State, members: Mapping[str, Member], event: Event) -> Mapping[str, Member]:
    if not isinstance(event, DeviceEvent) or event.device not in members:
        return members
    return {**members, event.device: _stage_member(state, members[event.device], event)}


def _stage_member(state: State, member: Member, event: DeviceEvent) -> Member:
    if expects(state, member, type(event)):
        return STAGES[state].arrived
    match event:
        case Answered(joins=True):
            return Member.JOINED if member is Member.INVITED else member
        case Answered() if member in _GAVE_NO_SECRET:
            return Member.DECLINED
        case Answered() if member in _GAVE_SECRETS:
            return Member.LEFT
        case Refused() if member in (*_GAVE_NO_SECRET, Member.SHARED):
            return Member.REFUSED
    return member


def _taken_out(before: Round, members: Mapping[str, Member]) -> Mapping[str, Member]:
    """What a revoked device gave counts no more, while the sum is not told."""
    if before.state not in COLLECTING:
        return members
    on = (*_GAVE_NO_SECRET, *_GAVE_SECRETS)
    return {
        device: Member.REFUSED if device in before.revoked and member in on else member
        for device, member in members.items()
    }


def _settled(before: Round, masked: Masked, event: Settled) -> Round:
    if event.of is not before.state:
        return before
    stage = STAGES[before.state]
    after = replace(before, state=stage.then)
    on = (*stage.waits_for, stage.arrived) if before.state in COLLECTING else _IN_THE_SUM
    members = {
        device: Member.LEFT if member in on and device not in event.staying else member
        for device, member in before.members.items()
    }
    if stage.then is State.AGREEING:
        masked = replace(masked, active=event.staying)
    return replace(after, members=members, masked=masked)


def _too_few(after: Round) -> str:
    stage = STAGES[after.state]
    states = list(after.members.values())
    came, open_ = states.count(stage.arrived), sum(state in stage.waits_for for state in states)
    if came + open_ >= after.min_devices:
        return ""
    return (
        f"{came} of {len(states)} invited devices sent {stage.what} and {open_} may still do so; "
        f"{after.min_devices} are needed"
    )
