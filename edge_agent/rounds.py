"""A round as the box sees it: states, events and what follows from each.

Reads and writes nothing: (kind, state, event) in, (state, commands) out; ledger.py keeps the row.
Never reads a clock, a file or the policy.
Source: ARCHITECTURE.md, "Rounds"; buffered rounds: Nguyen et al. 2022 (FedBuff); the hub's mirror is cloud_hub/rounds.py.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

GIVE_UP_AFTER_S = 7 * 24 * 3600.0  # a sealed update that the hub never asked for again leaves the disk

Kind = Literal["unsafe_open", "masked", "buffered_open", "buffered_masked"]


class State(StrEnum):
    """Beside each state, the facts that make it true. KEYED, SHARED, AGREED and UNMASKED are of masked rounds only;
    PREPARING and LATE of buffered ones, in which TRAINING is no more than the sealing of what was prepared.
    """

    INVITED = "invited"  # plan on disk; base bundle still on its way, nothing answered
    PREPARING = "preparing"  # joined; the learner trains, or finds an update that no sum has yet in the spool
    DECLINED = "declined"  # answer with reason is in the outbox or received; nothing will be sent
    KEYED = "keyed"  # joined; secrets on disk, public keys in the outbox or received
    SHARED = "shared"  # one cohort entered, for good; shares for the neighbours in the outbox or received
    TRAINING = "training"  # joined; no sealed update on disk: the learner works on it or starts again
    UPLOADING = "uploading"  # sealed update on disk, transfer row exists until the hub's receipt
    DELIVERED = "delivered"  # the hub has the update and has counted it
    AGREED = "agreed"  # one pair of survivor lists signed, for good; the signature in the outbox or received
    UNMASKED = "unmasked"  # the neighbours' shares that open the sum are in the outbox or received
    LATE = "late"  # over for this box, but for the training: its update goes into the spool, for a later round
    CLOSED = "closed"  # over for this box; its update file may go


class Event(StrEnum):
    INVITATION = "invitation"  # the hub sent the plan of a known round once more: it missed the answer, or was restored
    ADMITTED = "admitted"  # policy and facts allow it
    REFUSED_HERE = "refused-here"  # policy or facts forbid it
    PREPARED = "prepared"  # buffered: an update is in the spool
    COHORT_ENTERED = "cohort-entered"  # the cohort is sound; this box's secrets are shared among its neighbours
    SHARES_OPENED = "shares-opened"  # the neighbours' shares are here: whom to mask against is known
    SEALED = "sealed"  # the sealed update is on disk
    FAILED = "failed"  # training, sealing or a stage of a masked round failed for good
    LOST = "lost"  # the sealed update, or the one in the spool, is no longer on the disk
    ACCEPTED = "accepted"  # the hub's receipt for the update
    REJECTED = "rejected"  # the hub refuses the update
    SURVIVORS_SIGNED = "survivors-signed"  # the lists of who is in the sum are sound, and signed
    UNMASK_GIVEN = "unmask-given"  # enough neighbours signed the same lists: one share of each is given
    CLOSED_BY_HUB = "closed-by-hub"
    LEFT_OUT = "left-out"  # closed by the hub, and nothing was made of this box's update
    DEADLINE = "deadline"  # the plan's deadline has passed
    GIVEN_UP = "given-up"  # GIVE_UP_AFTER_S later the hub has still not closed it


class Command(StrEnum):
    SAY_YES = "say-yes"
    SAY_NO = "say-no"
    SAY_STAGE = "say-stage"  # the message of a masked round that came with the event
    KEEP_PART = "keep-part"  # the box's part in a masked round that came with the event
    NOTE_OPENED = (
        "note-opened"  # its neighbours can open a sum with this box's update from now on, and it may never hear of it
    )
    DROP_PART = "drop-part"  # its secrets, what it had still to say and what it had pledged of its privacy budget
    PLEDGE_PRIVACY = "pledge-privacy"  # where the round has noise: what it would cost counts from now on
    SPEND_PRIVACY = "spend-privacy"  # the pledge is spent, whatever becomes of the round
    OFFER_UPDATE = "offer-update"
    DROP_TRANSFER = "drop-transfer"
    DROP_UPDATE = "drop-update"
    KEEP_SPOOL = "keep-spool"  # the raw update that came with the event; one that is there already stays
    SHOW_SPOOL = "show-spool"  # the hub may read it from now on: no masked sum may hide it among others any more
    DROP_SPOOL = "drop-spool"  # it is in a sum, or another update is: no update is ever in two
    DROP_USED = "drop-used"  # from the spool what this round sealed, if it is still there


S, E, C = State, Event, Command
Table = Mapping[tuple[State, Event], tuple[State, tuple[Command, ...]]]

_END = (C.DROP_TRANSFER, C.DROP_UPDATE)
_OUT = (C.SAY_NO, C.DROP_PART, *_END)

OPEN: Table = MappingProxyType(
    {
        (S.INVITED, E.INVITATION): (S.INVITED, ()),
        (S.INVITED, E.ADMITTED): (S.TRAINING, (C.SAY_YES,)),
        (S.INVITED, E.REFUSED_HERE): (S.DECLINED, (C.SAY_NO,)),
        (S.INVITED, E.CLOSED_BY_HUB): (S.CLOSED, ()),
        (S.INVITED, E.DEADLINE): (S.CLOSED, ()),
        (S.DECLINED, E.INVITATION): (S.DECLINED, (C.SAY_NO,)),
        (S.DECLINED, E.CLOSED_BY_HUB): (S.CLOSED, ()),
        (S.DECLINED, E.DEADLINE): (S.CLOSED, ()),
        (S.TRAINING, E.INVITATION): (S.TRAINING, (C.SAY_YES,)),
        (S.TRAINING, E.SEALED): (S.UPLOADING, (C.OFFER_UPDATE, C.DROP_SPOOL)),
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
)

BEFORE_UPDATE = (S.KEYED, S.SHARED, S.TRAINING)
WITH_SECRETS = (S.KEYED, S.SHARED, S.TRAINING, S.UPLOADING, S.DELIVERED, S.AGREED, S.UNMASKED)
WITH_UPDATE = (S.UPLOADING, S.DELIVERED, S.AGREED, S.UNMASKED)
COUNTED = (S.DELIVERED, S.AGREED, S.UNMASKED)

# A stage asked for again is answered again in every later state; no state leads back to a second update.
MASKED: Table = MappingProxyType(
    {key: row for key, row in OPEN.items() if key[0] in (S.INVITED, S.DECLINED, S.CLOSED)}
    | {(S.INVITED, E.ADMITTED): (S.KEYED, (C.SAY_YES, C.KEEP_PART, C.PLEDGE_PRIVACY, C.SAY_STAGE))}
    | {(state, E.INVITATION): (state, (C.SAY_YES, C.SAY_STAGE)) for state in (*BEFORE_UPDATE, S.UPLOADING)}
    | {(state, E.INVITATION): (S.UPLOADING, (C.SAY_YES, C.SAY_STAGE, C.OFFER_UPDATE)) for state in COUNTED}
    | {(state, E.FAILED): (S.DECLINED, _OUT) for state in (*BEFORE_UPDATE, *WITH_UPDATE)}
    | {(state, E.LOST): (S.DECLINED, _OUT) for state in WITH_UPDATE}
    | {(state, E.CLOSED_BY_HUB): (S.CLOSED, (C.DROP_PART, *_END)) for state in (*BEFORE_UPDATE, *WITH_UPDATE)}
    | {(state, E.DEADLINE): (S.CLOSED, (C.SAY_NO, C.DROP_PART)) for state in BEFORE_UPDATE}
    | {(state, E.GIVEN_UP): (S.CLOSED, (C.DROP_PART, *_END)) for state in WITH_UPDATE}
    | {(state, E.COHORT_ENTERED): (state, (C.SAY_STAGE,)) for state in (S.SHARED, S.TRAINING, *WITH_UPDATE)}
    | {(state, E.SURVIVORS_SIGNED): (state, (C.SAY_STAGE,)) for state in (S.AGREED, S.UNMASKED)}
    | {
        (S.KEYED, E.COHORT_ENTERED): (S.SHARED, (C.KEEP_PART, C.SAY_STAGE)),
        (S.SHARED, E.SHARES_OPENED): (S.TRAINING, (C.KEEP_PART,)),
        (S.TRAINING, E.SEALED): (
            S.UPLOADING,
            (C.KEEP_PART, C.SPEND_PRIVACY, C.NOTE_OPENED, C.OFFER_UPDATE, C.DROP_SPOOL),
        ),
        (S.UPLOADING, E.ACCEPTED): (S.DELIVERED, (C.DROP_TRANSFER,)),
        (S.UPLOADING, E.REJECTED): (S.CLOSED, (C.DROP_PART, *_END)),
        # The lists name this box: the hub has its update, though its receipt was lost.
        (S.UPLOADING, E.SURVIVORS_SIGNED): (S.AGREED, (C.KEEP_PART, C.SAY_STAGE, C.DROP_TRANSFER)),
        (S.DELIVERED, E.SURVIVORS_SIGNED): (S.AGREED, (C.KEEP_PART, C.SAY_STAGE)),
        (S.AGREED, E.UNMASK_GIVEN): (S.UNMASKED, (C.SAY_STAGE,)),
        (S.UNMASKED, E.UNMASK_GIVEN): (S.UNMASKED, (C.SAY_STAGE,)),
    }
)

# A buffered round: trained first, said afterwards; who is late goes on training for a later one.
_PREPARES: Table = MappingProxyType(
    {
        (S.INVITED, E.ADMITTED): (S.PREPARING, (C.SAY_YES, C.PLEDGE_PRIVACY)),
        (S.PREPARING, E.INVITATION): (S.PREPARING, (C.SAY_YES,)),
        (S.PREPARING, E.FAILED): (S.DECLINED, (C.SAY_NO, C.DROP_PART)),
        (S.PREPARING, E.CLOSED_BY_HUB): (S.LATE, (C.DROP_PART,)),
        (S.PREPARING, E.DEADLINE): (S.LATE, (C.SAY_NO, C.DROP_PART)),
        (S.LATE, E.INVITATION): (S.LATE, (C.SAY_NO,)),
        (S.LATE, E.PREPARED): (S.CLOSED, (C.KEEP_SPOOL,)),
        (S.LATE, E.FAILED): (S.CLOSED, ()),
        (S.LATE, E.GIVEN_UP): (S.CLOSED, ()),
    }
)
BUFFERED_MASKED: Table = MappingProxyType(
    dict(MASKED) | dict(_PREPARES) | {(S.PREPARING, E.PREPARED): (S.KEYED, (C.KEEP_SPOOL, C.KEEP_PART, C.SAY_STAGE))}
)
# The spool is kept until the hub's receipt: what it refuses or has no room for is sealed anew for the next round.
BUFFERED_OPEN: Table = MappingProxyType(
    dict(OPEN)
    | dict(_PREPARES)
    | {
        (S.PREPARING, E.PREPARED): (S.TRAINING, (C.KEEP_SPOOL,)),
        (S.TRAINING, E.LOST): (S.PREPARING, ()),
        (S.TRAINING, E.SEALED): (S.UPLOADING, (C.OFFER_UPDATE, C.SHOW_SPOOL)),
        (S.UPLOADING, E.ACCEPTED): (S.DELIVERED, (C.DROP_TRANSFER, C.DROP_USED)),
        (S.UPLOADING, E.LEFT_OUT): (S.CLOSED, _END),
        # It may have been counted, and the receipt was lost; also where it is about to be sealed a second time.
        (S.UPLOADING, E.CLOSED_BY_HUB): (S.CLOSED, (C.DROP_USED, *_END)),
        (S.UPLOADING, E.GIVEN_UP): (S.CLOSED, (C.DROP_USED, *_END)),
        (S.TRAINING, E.CLOSED_BY_HUB): (S.CLOSED, (C.DROP_USED,)),
        (S.TRAINING, E.DEADLINE): (S.CLOSED, (C.SAY_NO, C.DROP_USED)),
        (S.TRAINING, E.LEFT_OUT): (S.CLOSED, ()),
    }
)


def _with_left_out(table: Table) -> Table:
    """Where nothing else is said, being left out is being closed."""
    closed = {(state, E.LEFT_OUT): row for (state, event), row in table.items() if event is E.CLOSED_BY_HUB}
    return MappingProxyType(closed | dict(table))


TABLES: Mapping[Kind, Table] = MappingProxyType(
    {
        "unsafe_open": _with_left_out(OPEN),
        "masked": _with_left_out(MASKED),
        "buffered_open": _with_left_out(BUFFERED_OPEN),
        "buffered_masked": _with_left_out(BUFFERED_MASKED),
    }
)
TO_WORK_ON = (S.LATE, S.PREPARING, S.TRAINING)  # by the learner
BEFORE_SEALING = (S.LATE, S.PREPARING)


def advance(kind: Kind, state: State, event: Event) -> tuple[State, tuple[Command, ...]]:
    """An event that a state does not know changes nothing: every message may come twice or late."""
    return TABLES[kind].get((state, event), (state, ()))


def expired(state: State, deadline_unix_s: float, now: float) -> Event | None:
    """What the clock says about a round. A ready update outlives the deadline: the hub may have been away."""
    if state is S.CLOSED or now < deadline_unix_s:
        return None
    if state in (*WITH_UPDATE, S.LATE):
        return E.GIVEN_UP if now >= deadline_unix_s + GIVE_UP_AFTER_S else None
    return E.DEADLINE
