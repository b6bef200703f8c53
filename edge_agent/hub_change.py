"""Another hub: what belongs to the one before ends, the bundle in use goes on reading.

Reads the enrolled CA; moves rows of rounds, bundles and the outbox, once per change.
Never talks to a hub; a certificate renewed by the same hub changes nothing.
Source: ARCHITECTURE.md, "Releases": release numbers and their protection against rollback are each hub's own.
"""

import logging
import sqlite3
from pathlib import Path

from edge_agent import bundles, database, ledger
from edge_agent.identity import Enrolled
from edge_agent.ledger import Outcome
from edge_agent.link import HIGHEST_SEQUENCE
from edge_agent.rounds import Event
from fleet_link import pki

log = logging.getLogger(__name__)

HUB = "hub"  # counter: the first 48 bits of the fingerprint of the hub's CA


def follow(db: sqlite3.Connection, data_dir: Path, enrolled: Enrolled, now: float) -> None:
    """At start. Killed in the middle, the next start does it again: the counter comes last."""
    theirs = int(pki.fingerprint(enrolled.folder.ca.read_bytes())[:12], 16)
    before = database.counter(db, HUB)
    if before == theirs:
        return
    if before:
        for known in ledger.in_states(db, *ledger.OPEN_STATES):
            reason = Outcome(reason="this box has moved to another hub")
            ledger.apply(db, data_dir, known.round_id, Event.CLOSED_BY_HUB, now, reason)
    with database.transaction(db):
        if before:
            db.execute("DELETE FROM link_outbox")
            database.forget(db, HIGHEST_SEQUENCE)
            bundles.forget_releases(db, data_dir)
        database.keep(db, HUB, theirs)
    if before:
        log.info("another hub: its first release is awaited, rounds and messages of the one before are over")
