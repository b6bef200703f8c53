"""A round as the box sees it: states, events and what follows from each.

Reads and writes nothing: (state, event) in, (state, commands) out; ledger.py keeps the row.
Never reads a clock, a file or the policy.
Source: ARCHITECTURE.md, "Rounds"; the hub's mirror is cloud_hub/rounds.py.
"""

from enum import StrEnum

GIVE_UP_AFTER_S = 7 * 24 * 3600.0  # a sealed update that the hub never asked for again leaves the disk


class State(StrEnum):
    """Beside each state, the facts that make it true."""

    INVITED = "invited"  # plan on disk; base bundle still on its way, nothing answered
    DECLINED = "declined"  # answer with reason is in the outbox or received; nothing will be sent
    TRAINING = "training"  # joined; no sealed update on disk: the learner works on it or starts again
    UPLOADING = "uploading"  # sealed update on disk, transfer row exists until the hub's receipt
    DELIVERED = "delivered"  # the hub has the update and has counted it
    CLOSED = "closed"  # over for this box; its update file may go


class Event(StrEnum):
    INVITATION = "invitation"  # the hub sent the plan of a known round once more: it missed the answer, or was restored
    ADMITTED = "admitted"  # policy and facts allow it
    REFUSED_HERE = "refused-here"  # policy or facts forbid it
    SEALED = "sealed"  # the sealed update is on disk
    FAILED = "failed"  # training or sealing failed for good
    LOST = "lost"  # the sealed update is no longer on the disk
    ACCEPTED = "accepted"  # the hub's receipt for the update
    REJECTED = "rejected"  # the hub refuses the update
    CLOSED_BY_HUB = "closed-by-hub"
    DEADLINE = "deadline"  # the plan's deadline has passed
    GIVEN_UP = "given-up"  # GIVE_UP_AFTER_S later the hub has still not closed it


class Command(StrEnum):
    SAY_YES = "say-yes"
    SAY_NO = "say-no"
    OFFER_UPDATE = "offer-update"
    DROP_TRANSFER = "drop-transfer"
    DROP_UPDATE = "drop-update"


S, E, C = State, Event, Command
_END = (C.DROP_TRANSFER, C.DROP_UPDATE)

TABLE: dict[tuple[State, Event], tuple[State, tuple[Command, ...]]] = {
    (S.INVITED, E.INVITATION): (S.INVITED, ()),
    (S.INVITED, E.ADMITTED): (S.TRAINING, (C.SAY_YES,)),
    (S.INVITED, E.REFUSED_HERE): (S.DECLINED, (C.SAY_NO,)),
    (S.INVITED, E.CLOSED_BY_HUB): (S.CLOSED, ()),
    (S.INVITED, E.DEADLINE): (S.CLOSED, ()),
    (S.DECLINED, E.INVITATION): (S.DECLINED, (C.SAY_NO,)),
    (S.DECLINED, E.CLOSED_BY_HUB): (S.CLOSED, ()),
    (S.DECLINED, E.DEADLINE): (S.CLOSED, ()),
    (S.TRAINING, E.INVITATION): (S.TRAINING, (C.SAY_YES,)),
    (S.TRAINING, E.SEALED): (S.UPLOADING, (C.OFFER_UPDATE,)),
    (S.TRAINING, E.FAILED): (S.DECLINED, (C.SAY_NO,)),
    (S.TRAINING, E.CLOSED_BY_HUB): (S.CLOSED, ()),
    (S.TRAINING, E.DEADLINE): (S.CLOSED, (C.SAY_NO,)),
    (S.UPLOADING, E.INVITATION): (S.UPLOADING, (C.SAY_YES,)),
    (S.UPLOADING, E.LOST): (S.TRAINING, (C.DROP_TRANSFER,)),
    (S.UPLOADING, E.ACCEPTED): (S.DELIVERED, (C.DROP_TRANSFER,)),
    (S.UPLOADING, E.REJECTED): (S.CLOSED, _END),
    (S.UPLOADING, E.CLOSED_BY_HUB): (S.CLOSED, _END),
    (S.UPLOADING, E.GIVEN_UP): (S.CLOSED, _END),
    (S.DELIVERED, E.INVITATION): (S.UPLOADING, (C.SAY_YES, C.OFFER_UPDATE)),
    (S.DELIVERED, E.LOST): (S.DECLINED, (C.SAY_NO,)),
    (S.DELIVERED, E.CLOSED_BY_HUB): (S.CLOSED, _END),
    (S.DELIVERED, E.GIVEN_UP): (S.CLOSED, _END),
    (S.CLOSED, E.INVITATION): (S.CLOSED, (C.SAY_NO,)),
}


def advance(state: State, event: Event) -> tuple[State, tuple[Command, ...]]:
    """An event that a state does not know changes nothing: every message may come twice or late."""
    return TABLE.get((state, event), (state, ()))


def expired(state: State, deadline_unix_s: float, now: float) -> Event | None:
    """What the clock says about a round. A ready update outlives the deadline: the hub may have been away."""
    if state is S.CLOSED or now < deadline_unix_s:
        return None
    if state in (S.UPLOADING, S.DELIVERED):
        return E.GIVEN_UP if now >= deadline_unix_s + GIVE_UP_AFTER_S else None
    return E.DEADLINE
