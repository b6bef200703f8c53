"""Large things between box and hub: sealed updates out, bundles in, chunk by chunk.

Reads rows of transfers_out; writes incoming/ and bundles/ in data_dir; what to send goes through two callables.
Never decides what may be received (releases.py) and never opens what it carries.
Source: ARCHITECTURE.md, "The link": chunks with a digest, resumed from what the other side already has.
"""

import logging
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from edge_agent import bundles, ledger, releases
from edge_agent.rounds import Event
from fleet_link import chunks
from fleet_link.errors import SiteError, TrustError
from fleet_link.files import move_durably
from fleet_link.messages import AnyMessage, TransferOffer, TransferProgress, TransferReceipt
from fleet_link.part_file import sweep
from models.bundle import MAX_FILE_BYTES

log = logging.getLogger(__name__)

INCOMING = "incoming"
RETRY_S = 30.0  # after the disk refused a bundle that had come
STALE_S = 7 * 24 * 3600.0  # half-received bundles that nobody has continued since then go


class Transfers:
    """Both directions. Owned by the link's thread."""

    def __init__(
        self,
        db: sqlite3.Connection,
        data_dir: Path,
        say: Callable[[AnyMessage], None],
        send_chunk: Callable[[bytes], bool],
    ) -> None:
        """`send_chunk` gives False while the way out is full."""
        self._db = db
        self._data_dir = data_dir
        self._say = say
        self._send_chunk = send_chunk
        self._outgoing: dict[str, chunks.Outgoing] = {}
        self._incoming: dict[str, chunks.Incoming] = {}
        self._not_before: dict[str, float] = {}  # by transfer that the disk refused
        self._spool = data_dir / INCOMING

    def repair(self, now: float) -> None:
        """At start."""
        self._spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep(self._spool, older_than_unix_s=now - STALE_S)

    @property
    def is_flowing(self) -> bool:
        """Chunks may come or go at any moment."""
        return bool(self._incoming) or any(outgoing.started for outgoing in self._outgoing.values())

    # --- out ------------------------------------------------------------------------------------------

    def load_outgoing(self, now: float) -> None:
        """Follow the rows: a new one starts a transfer, a row that is gone ends it. Raises SiteError if a file cannot be read."""
        rows = {row["transfer_id"]: row for row in self._db.execute("SELECT * FROM transfers_out")}
        for transfer_id in self._outgoing.keys() - rows.keys():
            self._outgoing.pop(transfer_id).close()
        trouble = None
        for transfer_id in rows.keys() - self._outgoing.keys():
            try:
                self._start_outgoing(rows[transfer_id], now)
            except SiteError as error:  # the others start all the same
                trouble = error
        if trouble is not None:
            raise trouble

    def _start_outgoing(self, row: sqlite3.Row, now: float) -> None:
        path = self._data_dir / row["path"]
        if not path.exists() or path.stat().st_size != row["size"]:
            known = ledger.find(self._db, row["subject"])
            if known is not None:
                ledger.lose_update(self._db, self._data_dir, known, "its sealed update is lost from the disk", now)
            return
        offer = chunks.new_offer(
            path,
            kind=row["kind"],
            subject=row["subject"],
            transfer_id=row["transfer_id"],
            message_id=row["transfer_id"],
        )
        self._outgoing[row["transfer_id"]] = chunks.Outgoing(path, offer)

    def send_due(self) -> None:
        """Offers, and as many chunks as window and queue take."""
        moment = time.monotonic()  # a clock that is set back must not hold up a transfer
        for outgoing in self._outgoing.values():
            if outgoing.offer_due(moment):
                self._say(outgoing.offer)
            for _, frame in outgoing.due(moment):
                if not self._send_chunk(frame):
                    return

    def on_progress(self, progress: TransferProgress) -> None:
        outgoing = self._outgoing.get(progress.transfer_id)
        if outgoing is not None:
            outgoing.on_progress(progress, time.monotonic())

    def on_receipt(self, receipt: TransferReceipt, now: float) -> None:
        """The hub has the update and has counted it, or refuses it for good."""
        row = self._db.execute("SELECT * FROM transfers_out WHERE transfer_id = ?", (receipt.transfer_id,)).fetchone()
        if row is None:
            return
        event = Event.ACCEPTED if receipt.accepted else Event.REJECTED
        reason = "" if receipt.accepted else f"the hub refused the update: {receipt.reason}"
        ledger.apply(self._db, self._data_dir, row["subject"], event, now, ledger.Outcome(reason=reason))

    # --- in -------------------------------------------------------------------------------------------

    def on_offer(self, offer: TransferOffer) -> None:
        """Take, resume or refuse; a refusal says why."""
        incoming = self._incoming.get(offer.transfer_id)
        if incoming is not None:
            incoming.on_offer()
            return
        if time.monotonic() < self._not_before.get(offer.transfer_id, 0.0):
            return
        state, reason = self._judge(offer)
        if state == "done" or reason:
            self._answer(offer, reason)
            return
        incoming = chunks.Incoming.open(self._spool, offer, max_bytes=MAX_FILE_BYTES)
        self._incoming[offer.transfer_id] = incoming
        log.info("bundle %s: receiving %d bytes", offer.subject[:12], offer.size)

    def on_chunk(self, frame: bytes) -> None:
        transfer_id, _, _ = chunks.parse_frame(frame)
        incoming = self._incoming.get(transfer_id)
        if incoming is None:
            return  # late: finished, or of a transfer that a restart forgot; the hub offers it again
        incoming.on_chunk(frame)

    def receive_due(self, now: float) -> None:
        """Progress to the hub; whole files into their place.

        Raises TrustError on a wrong digest, which is then reported; SiteError while the disk refuses: the hub's next
        offer after RETRY_S goes on with what has come.
        """
        for transfer_id, incoming in list(self._incoming.items()):
            if incoming.complete:
                del self._incoming[transfer_id]
                self._finish(incoming, now)
            elif incoming.progress_due(time.monotonic()):
                self._say(TransferProgress(
                    message_id=ledger.message_id("progress", transfer_id, now),
                    transfer_id=transfer_id,
                    received_bitmap=incoming.bitmap,
                ))  # fmt: skip

    def _finish(self, incoming: chunks.Incoming, now: float) -> None:
        offer = incoming.offer
        try:
            whole = incoming.finish()
            move_durably(whole, self._data_dir / bundles.path_of(offer.subject))
        except SiteError:
            self._not_before[offer.transfer_id] = time.monotonic() + RETRY_S
            raise
        except TrustError as error:
            incoming.drop()
            releases.came_damaged(self._db, offer.subject, str(error), now)
            self._answer(offer, str(error))
            raise
        releases.arrived(self._db, offer.subject, now)
        log.info("bundle %s: received", offer.subject[:12])
        self._answer(offer, "")

    def _judge(self, offer: TransferOffer) -> tuple[str, str]:
        """("wanted" | "done", reason for a refusal)."""
        row = self._db.execute("SELECT * FROM bundles WHERE bundle_digest = ?", (offer.subject,)).fetchone()
        if offer.kind != "bundle" or row is None:
            return "", "this box has not asked for it"
        if row["state"] == "refused":
            return "", row["reason"]
        if row["state"] != "offered":
            return "done", ""
        if offer.sha256 != offer.subject:
            return "", "its digest is not that of the release"
        if offer.size > MAX_FILE_BYTES:
            return "", f"{offer.size} bytes are more than a bundle may have"
        if offer.size > shutil.disk_usage(self._data_dir).free // 2:
            raise SiteError("no space for a new bundle", advice="free some disk; the hub offers it again")
        return "wanted", ""

    def _answer(self, offer: TransferOffer, reason: str) -> None:
        self._say(TransferReceipt(
            message_id=ledger.message_id("receipt", offer.transfer_id, reason),
            transfer_id=offer.transfer_id,
            accepted=not reason,
            reason=reason,
        ))  # fmt: skip

    def close(self) -> None:
        """Let go of all files; both sides resume from the disk."""
        for outgoing in self._outgoing.values():
            outgoing.close()
        for incoming in self._incoming.values():
            incoming.close()
