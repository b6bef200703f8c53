"""The stages of a masked round: each message of the hub takes this box one step on, or makes it give the round up.

Reads and writes parts and rounds through ledger.py; masking.py says what each step must prove.
Never takes a step twice otherwise than the first time, and never comes back to a round it gave up.
Source: ARCHITECTURE.md, "Rounds"; the hub's mirror is cloud_hub/masked.py.
"""

import logging
import sqlite3
from pathlib import Path

import msgspec

from edge_agent import ledger, masking
from edge_agent.identity import Enrolled
from edge_agent.ledger import Outcome, Stage
from edge_agent.masking import Part
from edge_agent.rounds import Event
from fleet_link import cohort
from fleet_link.cohort import Judge
from fleet_link.errors import PeerError, SiteError, TooFewError, TrustError
from fleet_link.messages import Agreement, Cohort, RoundKeys, RoundPlan, SharesForwarded, Survivors
from fleet_link.pki import Identity

log = logging.getLogger(__name__)

FromHub = Cohort | SharesForwarded | Survivors | Agreement
UNNAMED = "0" * 32  # until the message has its own id


def begin(plan: RoundPlan, identity: Identity, min_cohort: int) -> tuple[Part, Stage]:
    """Fresh secrets: once in a round, to be kept before the keys are said. `min_cohort` is the site's own."""
    part, keys = masking.begin(plan, identity, masking.draw_secrets(), min_cohort=min_cohort, message_id=UNNAMED)
    return part, _named(keys, part)


def keys_again(db: sqlite3.Connection, round_id: str) -> Stage | None:
    """For a hub that asks anew; None where this box has no part any more. Raises SiteError on a damaged row."""
    part = ledger.part_of(db, round_id)
    if part is None:
        return None
    return _named(
        RoundKeys(message_id=UNNAMED, round_id=round_id, plan_digest=part.of.plan_digest, keys=part.keys), part
    )


def take(db: sqlite3.Connection, data_dir: Path, enrolled: Enrolled, message: FromHub, now: float) -> None:
    """One step, its message and its secrets in one transaction. Of a round that is not on here it is late: nothing happens.

    Raises TrustError or SiteError after giving the round up, so that somebody hears of it; of another box's fault the hub
    hears by the reason, and here the log tells.
    """
    known = ledger.find(db, message.round_id)
    if known is None:
        return
    try:
        part = ledger.part_of(db, message.round_id)
        if part is None:
            return
        event, outcome = _step(part, message, enrolled, now)
    except (TrustError, SiteError) as error:
        log.warning("round %s: given up: %s", message.round_id, error)
        ledger.apply(db, data_dir, message.round_id, Event.FAILED, now, Outcome(reason=str(error)))
        if isinstance(error, PeerError):
            return
        if isinstance(error, TooFewError) and part is not None and _asks_for_more(part, known.plan):
            return
        raise
    ledger.apply(db, data_dir, message.round_id, event, now, outcome)


def _step(part: Part, message: FromHub, enrolled: Enrolled, now: float) -> tuple[Event, Outcome]:
    match message:
        case Cohort():
            part, shares = masking.enter(part, message, Judge(enrolled.trust, now), message_id=UNNAMED)
            return Event.COHORT_ENTERED, Outcome(part=part, said=_named(shares, part))
        case SharesForwarded():
            return Event.SHARES_OPENED, Outcome(part=masking.admit(part, message))
        case Survivors():
            _check_key(part, enrolled.identity)
            part, signed = masking.sign_survivors(part, enrolled.identity, message, message_id=UNNAMED)
            return Event.SURVIVORS_SIGNED, Outcome(part=part, said=_named(signed, part), reason="")
        case Agreement():
            return Event.UNMASK_GIVEN, Outcome(said=_named(masking.unmask(part, message, message_id=UNNAMED), part))


def _check_key(part: Part, identity: Identity) -> None:
    """Raises SiteError where the key that the others know this box by in the round was replaced meanwhile."""
    if not part.signature and identity.certificate_der != part.keys.certificate:
        raise SiteError(
            f"this box's certificate was replaced in the middle of round {part.of.round_id}",
            advice="nothing to do: the next round is signed with the new one",
        )


def _asks_for_more(part: Part, plan: RoundPlan) -> bool:
    """The site, than the plan says: the hub could not know, and has told no lie."""
    return part.min_cohort > cohort.smallest_allowed(plan.min_cohort)


def _named(message: Stage, part: Part) -> Stage:
    """A stage is said once in a round: the same keys, round and kind have the same id."""
    name = ledger.message_id(type(message).__name__, part.of.round_id, part.keys.mask_key.hex())
    return msgspec.structs.replace(message, message_id=name)
