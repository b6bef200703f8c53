"""Large things between hub and boxes: sealed updates in, bundles out, chunk by chunk.

Reads bundles; writes rounds/<round>/incoming and the table transfers; what to send goes through two callables.
Never decides what may be received (intake.py) nor what may be fetched (distribution.py), never opens what it carries.
Source: ARCHITECTURE.md, "The link": chunks with a digest, resumed from what the other side already has.
"""

import logging
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import delete

from cloud_hub.config import Config
from cloud_hub.database import Database, Transfer
from cloud_hub.intake import Intake
from fleet_link import chunks
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import AnyMessage, TransferOffer, TransferProgress, TransferReceipt
from fleet_link.topics import HUB

log = logging.getLogger(__name__)

SILENCE_S = 60.0  # a box that says nothing about a bundle for so long asks again when it is back
ROW_S = 1.0  # pause between two looks of the operator at the bytes moved

Key = tuple[str, str]  # device, transfer id


class Transfers:
    """Both directions. Owned by the hub's loop."""

    def __init__(
        self,
        config: Config,
        database: Database,
        intake: Intake,
        say: Callable[[str, AnyMessage], None],
        send_chunk: Callable[[str, bytes], bool],
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """`send_chunk` gives False while the way out is full. `seconds`: for pauses; nobody sets that clock."""
        self._config = config
        self._database = database
        self._intake = intake
        self._say = say
        self._send_chunk = send_chunk
        self._seconds = seconds
        self._incoming: dict[Key, chunks.Incoming] = {}
        self._outgoing: dict[Key, chunks.Outgoing] = {}
        self._heard_at: dict[Key, float] = {}
        self._row_at: dict[Key, float] = {}

    @property
    def is_flowing(self) -> bool:
        """Chunks may come or go at any moment."""
        return bool(self._incoming) or any(outgoing.started for outgoing in self._outgoing.values())

    def close(self) -> None:
        """Let go of all files; both sides resume from the disk."""
        for outgoing in self._outgoing.values():
            outgoing.close()
        for incoming in self._incoming.values():
            incoming.close()

    # --- in -------------------------------------------------------------------------------------------

    def on_offer(self, device: str, offer: TransferOffer, now: float) -> None:
        """Take, resume or refuse; a refusal says why. Raises SiteError while there is no room."""
        if offer.kind != "update":
            raise LinkError(f"{device} offers a {offer.kind}, which only the hub sends")
        incoming = self._incoming.get((device, offer.transfer_id))
        if incoming is not None:
            incoming.on_offer()
            return
        action, reason = self._intake.judge_update(device, offer, now)
        if action == "refuse":
            self._refuse(device, offer, reason, now)
        elif action == "done":
            self._answer(device, offer, "")
        elif action == "take":
            self._open(device, offer, now)

    def on_chunk(self, device: str, frame: bytes) -> None:
        transfer_id, _, _ = chunks.parse_frame(frame)
        incoming = self._incoming.get((device, transfer_id))
        if incoming is not None:  # else late: finished, or of a transfer that a restart forgot; the box offers it again
            incoming.on_chunk(frame)

    def receive_due(self, now: float) -> None:
        """Progress to the boxes; whole files to the intake, then the receipt."""
        troubles = []
        for (device, transfer_id), incoming in list(self._incoming.items()):
            try:
                self._receive(device, transfer_id, incoming, now)
            except SiteError as error:  # of this one alone: the others go on
                self._incoming.pop((device, transfer_id), None)
                incoming.close()
                troubles.append(error)
        if troubles:
            raise troubles[0]

    def _receive(self, device: str, transfer_id: str, incoming: chunks.Incoming, now: float) -> None:
        if incoming.complete:
            del self._incoming[device, transfer_id]
            self._finish(device, incoming, now)
        elif incoming.progress_due(self._seconds()):
            progress = TransferProgress(message_id=_id(), transfer_id=transfer_id, received_bitmap=incoming.bitmap)
            self._say(device, progress)
            received = int.from_bytes(incoming.bitmap, "little").bit_count() * incoming.offer.chunk_bytes
            self._note(device, incoming.offer, "in", min(received, incoming.offer.size), now)

    def drop_unwanted(self, now: float) -> None:
        """After a round's end: what is still coming in for it goes; its box is told that the round is closed."""
        for (device, transfer_id), incoming in list(self._incoming.items()):
            if self._intake.judge_update(device, incoming.offer, now)[0] != "take":
                self._incoming.pop((device, transfer_id)).drop()

    def _open(self, device: str, offer: TransferOffer, now: float) -> None:
        """One at a time of each device: a new one takes the place of an older one."""
        folder = self._config.paths.rounds / offer.subject / "incoming" / device
        for key in [key for key in self._incoming if key[0] == device]:
            self._incoming.pop(key).drop()
            self._row_at.pop(key, None)
        if offer.size > shutil.disk_usage(self._config.paths.data_dir).free // 2:
            raise SiteError("no space for updates", advice="free some disk at the hub; the boxes offer them again")
        folder.mkdir(parents=True, exist_ok=True)
        incoming = chunks.Incoming.open(folder, offer, max_bytes=self._intake.update_bytes_max(offer.subject))
        self._incoming[device, offer.transfer_id] = incoming
        with self._database.writing() as session:  # of what it offered before under other names nothing comes
            session.execute(
                delete(Transfer).where(
                    Transfer.device == device,
                    Transfer.direction == "in",
                    Transfer.subject == offer.subject,
                    Transfer.state == "open",
                    Transfer.transfer_id != offer.transfer_id,
                )
            )
        self._note(device, offer, "in", 0, now)
        log.info("round %s: receiving %d bytes from %s", offer.subject, offer.size, device)

    def _finish(self, device: str, incoming: chunks.Incoming, now: float) -> None:
        offer = incoming.offer
        try:
            whole = incoming.finish()
        except TrustError as error:
            # TLS carried it and its index fits: the file never had the digest that its sender gave.
            incoming.drop()
            self._intake.refuse_update(device, offer.subject, str(error), now)
            self._answer(device, offer, str(error))
            self._note(device, offer, "in", offer.size, now, state="refused", reason=str(error))
            return
        reason = self._intake.take_update(device, offer, whole, now)
        incoming.drop()
        self._note(device, offer, "in", offer.size, now, state="refused" if reason else "done", reason=reason)
        self._answer(device, offer, reason)

    def _refuse(self, device: str, offer: TransferOffer, reason: str, now: float) -> None:
        self._intake.refuse_update(device, offer.subject, reason, now)
        self._answer(device, offer, reason)

    def _answer(self, device: str, offer: TransferOffer, reason: str) -> None:
        receipt = TransferReceipt(
            message_id=_id(), transfer_id=offer.transfer_id, accepted=not reason, reason=reason[:500]
        )
        self._say(device, receipt)

    # --- out ------------------------------------------------------------------------------------------

    def is_sending(self, device: str, digest: str) -> bool:
        return (device, _bundle_transfer(digest)) in self._outgoing

    def send_bundle(self, device: str, digest: str, path: Path, now: float) -> None:
        """Start it. Raises SiteError if the file cannot be read."""
        transfer_id = _bundle_transfer(digest)
        key = (device, transfer_id)
        offer = chunks.new_offer(path, kind="bundle", subject=digest, transfer_id=transfer_id, message_id=_id())
        self._outgoing[key] = chunks.Outgoing(path, offer)
        self._heard_at[key] = self._seconds()
        self._note(device, offer, "out", 0, now)

    def on_progress(self, device: str, progress: TransferProgress, now: float) -> None:
        key = (device, progress.transfer_id)
        outgoing = self._outgoing.get(key)
        if outgoing is None:
            return
        outgoing.on_progress(progress, self._seconds())
        self._heard_at[key] = self._seconds()
        self._note(device, outgoing.offer, "out", outgoing.bytes_sent, now)

    def on_receipt(self, device: str, receipt: TransferReceipt, now: float) -> None:
        outgoing = self._outgoing.pop((device, receipt.transfer_id), None)
        if outgoing is None:
            return
        outgoing.close()
        state = "done" if receipt.accepted else "refused"
        self._note(device, outgoing.offer, "out", outgoing.bytes_sent, now, state=state, reason=receipt.reason)
        log.info("bundle %s: %s by %s", outgoing.offer.subject[:12], state, device)

    def send_due(self) -> None:
        """Offers, and as many chunks as window and queue take."""
        troubles, now = [], self._seconds()
        for (device, transfer_id), outgoing in list(self._outgoing.items()):
            if now - self._heard_at[device, transfer_id] > SILENCE_S:
                self._outgoing.pop((device, transfer_id)).close()
                continue
            try:
                if not self._send(device, outgoing, now):
                    break
            except SiteError as error:  # of this one alone: the others go on, its box asks again
                self._outgoing.pop((device, transfer_id)).close()
                troubles.append(error)
        if troubles:
            raise troubles[0]

    def _send(self, device: str, outgoing: chunks.Outgoing, now: float) -> bool:
        """False when the queue takes no more."""
        if outgoing.offer_due(now):
            self._say(device, outgoing.offer)
        return all(self._send_chunk(device, frame) for _, frame in outgoing.due(now))

    # --- for the operator -----------------------------------------------------------------------------

    def _note(
        self,
        device: str,
        offer: TransferOffer,
        direction: str,
        moved: int,
        now: float,
        *,
        state: str = "open",
        reason: str = "",
    ) -> None:
        key = (device, offer.transfer_id)
        if state == "open" and self._seconds() - self._row_at.get(key, -ROW_S) < ROW_S:
            return
        self._row_at[key] = self._seconds()
        if state != "open":
            del self._row_at[key]
        with self._database.writing() as session:
            session.merge(
                Transfer(
                    transfer_id=offer.transfer_id,
                    device=device,
                    direction=direction,
                    kind=offer.kind,
                    subject=offer.subject,
                    sha256=offer.sha256,
                    size=offer.size,
                    bytes_moved=moved,
                    state=state,
                    reason=reason[:500],
                    changed_at=now,
                )
            )


def _bundle_transfer(digest: str) -> str:
    return chunks.transfer_id(kind="bundle", subject=digest, sha256=digest, sender=HUB)


def _id() -> str:
    return secrets.token_hex(16)
