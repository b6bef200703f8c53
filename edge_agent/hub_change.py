"""Another hub: what belongs to the one before ends. Another certificate: what was sealed with the old one is made anew.

Reads the enrolled CA and certificate; moves rows of rounds, bundles and the outbox, once per change.
Never talks to a hub; the bundle in use goes on reading.
Source: ARCHITECTURE.md, "Releases": release numbers and their protection against rollback are each hub's own.
"""

import logging
import sqlite3
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from edge_agent import bundles, database, identity, ledger, replay
from edge_agent.identity import Enrolled
from edge_agent.ledger import Outcome
from edge_agent.rounds import COUNTED, Event, State
from fleet_link import pki

log = logging.getLogger(__name__)

HIGHEST_SEQUENCE = "hub_sequence"  # counter: of the hub's messages
HUB = "hub"  # counter: the first 48 bits of the fingerprint of the hub's root; its intermediates come and go
CERTIFICATE = "certificate"  # counter: and of the certificate of this box


def follow(db: sqlite3.Connection, data_dir: Path, enrolled: Enrolled, now: float) -> None:
    """At start and after a renewal. Killed in the middle, the next start does it again: the counters come last."""
    _follow_hub(db, data_dir, _mark(identity.root_pem(enrolled.folder)), now)
    ours = _mark(enrolled.identity.certificate_der)
    if database.counter(db, CERTIFICATE) not in (0, ours, _renewed(enrolled, now)):
        _drop_sealed(db, data_dir, now)
    database.keep(db, CERTIFICATE, ours)


def _follow_hub(db: sqlite3.Connection, data_dir: Path, theirs: int, now: float) -> None:
    before = database.counter(db, HUB)
    if before == theirs:
        return
    if before:
        for known in ledger.in_states(db, *ledger.OPEN_STATES):
            reason = Outcome(reason="this box has moved to another hub")
            ledger.apply(db, data_dir, known.round_id, Event.CLOSED_BY_HUB, now, reason)
        ledger.abandon_spool(db, data_dir, "this box has moved to another hub", now)
    with database.transaction(db):
        if before:
            db.execute("DELETE FROM link_outbox")
            database.forget(db, HIGHEST_SEQUENCE)
            replay.forget(db)
            bundles.forget_releases(db, data_dir)
        database.keep(db, HUB, theirs)
    if before:
        log.info("another hub: its first release is awaited, rounds and messages of the one before are over")


def _drop_sealed(db: sqlite3.Connection, data_dir: Path, now: float) -> None:
    """The hub refuses for good what a replaced certificate has signed: an update on its way is trained and sealed again.

    One that the hub has counted is not made twice: without its file, a hub that asks for it once more hears so.
    """
    for known in ledger.in_states(db, State.UPLOADING):
        ledger.lose_update(db, data_dir, known, "its update was sealed with the certificate before", now)
    for known in ledger.in_states(db, *COUNTED):
        if known.update_path:
            (data_dir / known.update_path).unlink(missing_ok=True)


def _renewed(enrolled: Enrolled, now: float) -> int:
    """The certificate that ours has renewed: what it has sealed counts until it ends. 0 where there is none."""
    try:
        former = x509.load_pem_x509_certificate(enrolled.folder.former.read_bytes())
    except (OSError, ValueError):
        return 0
    return _mark(former.public_bytes(Encoding.DER)) if now < former.not_valid_after_utc.timestamp() else 0


def _mark(content: bytes) -> int:
    return int(pki.fingerprint(content)[:12], 16)
