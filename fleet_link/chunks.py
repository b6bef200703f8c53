"""Chunks: a large file sent in pieces over a lossy pipe, resumed from what the receiver already has.

Reads the sender's file; the receiver's file is `part_file`'s. Both sides are driven by the caller's loop.
Never trusts the pipe: the receiver's bitmap says what arrived, the SHA-256 of the whole decides. Reads no clock.
Source: ARCHITECTURE.md, "The link" (QoS 0 chunks, bitmap back every 50 ms, resend after 1 s).
"""

import hashlib
import os
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import TransferOffer, TransferProgress
from fleet_link.part_file import MAX_CHUNKS, PartFile, bitmap_bytes, chunk_bounds, chunk_count, file_sha256

CHUNK_BYTES = 64 * 1024
WINDOW_BYTES = 8 * 1024**2  # sent and not yet reported as received
RESEND_S = 1.0  # silence after which the oldest chunk goes again
MAX_PATIENCE_S = 10.0
OFFER_INTERVAL_S = 2.0
PROGRESS_INTERVAL_S = 0.05
MAX_QUIET_PROGRESS_S = 30.0
SYNC_INTERVAL_S = 1.0

_HEADER = struct.Struct(">16sI")


def frame(transfer_id: str, index: int, payload: bytes) -> bytes:
    """What travels on the chunk topic: 16 bytes of id, index as unsigned 32 bits big-endian, payload."""
    return _HEADER.pack(bytes.fromhex(transfer_id), index) + payload


def parse_frame(chunk: bytes) -> tuple[str, int, bytes]:
    """Give (transfer id, index, payload). Raises LinkError if there is no header or no payload."""
    if len(chunk) <= _HEADER.size:
        raise LinkError(f"chunk of {len(chunk)} bytes has no payload")
    raw_id, index = _HEADER.unpack_from(chunk)
    return raw_id.hex(), index, chunk[_HEADER.size :]


def transfer_id(*, kind: str, subject: str, sha256: str, sender: str) -> str:
    """The same file for the same purpose has the same id, so a restart of either side resumes the same transfer."""
    return hashlib.sha256("|".join((kind, subject, sha256, sender)).encode()).hexdigest()[:32]


def new_offer(
    path: Path, *, kind: Literal["update", "bundle"], subject: str, transfer_id: str, message_id: str
) -> TransferOffer:
    """Describe the file at `path`. Raises SiteError if it cannot be read, is empty or too large."""
    try:
        size, sha256 = path.stat().st_size, file_sha256(path)
    except OSError as error:
        raise SiteError(f"{path.name} cannot be read: {error}", advice="check the disk") from error
    if not 0 < size <= MAX_CHUNKS * CHUNK_BYTES:
        raise SiteError(f"{path.name} of {size} bytes cannot be transferred")
    return TransferOffer(
        message_id=message_id,
        transfer_id=transfer_id,
        kind=kind,
        subject=subject,
        sha256=sha256,
        size=size,
        chunk_bytes=CHUNK_BYTES,
    )


class Outgoing:
    """Sends one file. The caller publishes what `due` yields and passes on every TransferProgress.

    A chunk is lost when one sent after it has arrived (the pipe keeps order), or nothing arrives for a while.
    After silence one chunk goes again, then two, four: the first to arrive shows what else was lost. So a slow
    line is never filled with repeats, and a broker that was killed costs about a second.
    """

    def __init__(self, path: Path, offer: TransferOffer) -> None:
        """Raises SiteError if the file is not there or not as long as offered."""
        self.offer = offer
        self.bytes_sent = 0  # frames handed over, repeats included
        self.started = False  # the receiver has answered the offer
        self._count = chunk_count(offer)
        self._received = 0  # bit i: the receiver has chunk i
        self._waiting: deque[int] = deque(range(self._count))
        self._in_flight: dict[int, int] = {}  # chunk index → number of its latest sending, oldest first
        self._sendings = 0
        self._window = max(1, WINDOW_BYTES // offer.chunk_bytes)
        self._probes = 1
        self._patience_s = RESEND_S
        self._news_at = 0.0  # the last time a chunk was reported, or sending began after a pause
        self._heard_at = float("-inf")
        try:
            self._file = path.open("rb")
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise SiteError(f"{path.name} cannot be read: {error}", advice="check the disk") from error
        if size != offer.size:
            self._file.close()
            raise SiteError(f"{path.name} has {size} bytes, {offer.size} were offered", advice="make the offer again")

    @property
    def complete(self) -> bool:
        """Every chunk is reported as received; the receiver's TransferReceipt is still to come."""
        return self._received.bit_count() == self._count

    def close(self) -> None:
        self._file.close()

    def offer_due(self, now: float) -> bool:
        """True when the offer should be published (again): nothing heard or offered for 2 s. Asking counts as doing."""
        if now - self._heard_at < OFFER_INTERVAL_S:
            return False
        self._heard_at = now
        return True

    def on_progress(self, progress: TransferProgress, now: float) -> None:
        """Take the receiver's latest word as the truth, also where it has less than before (it was restarted).

        Raises LinkError if the bitmap does not fit the transfer; the state is then unchanged.
        """
        received = self._parse_bitmap(progress)
        if not self.started:
            self.started, self._news_at = True, now
        self._heard_at = now
        gained, lost = received & ~self._received, self._received & ~received
        self._received = received
        self._waiting.extend(index for index in _bits(lost) if index not in self._in_flight)
        if gained:
            self._on_gained(gained, now)

    def due(self, now: float) -> Iterator[tuple[int, bytes]]:
        """Give (index, frame) to publish now. A frame counts as sent once the caller asks for the next one:

            for index, frame in outgoing.due(now):
                if not bus.publish_chunk(topic, frame):
                    break  # not sent: it will be due again

        Raises SiteError if the file cannot be read any more.
        """
        if not self.started:
            return
        if not self._in_flight:
            self._news_at = now
        elif now - self._news_at >= self._patience_s:
            self._on_silence(now)
        while self._waiting and len(self._in_flight) < self._window:
            index = self._waiting[0]
            if index not in self._in_flight and not self._received >> index & 1:
                chunk = frame(self.offer.transfer_id, index, self._read(index))
                yield index, chunk
                self._sendings += 1
                self._in_flight[index] = self._sendings
                self.bytes_sent += len(chunk)
            if self._waiting and self._waiting[0] == index:  # a progress meanwhile may have put others in front
                self._waiting.popleft()

    def _on_gained(self, gained: int, now: float) -> None:
        arrived = [self._in_flight.pop(index) for index in _bits(gained) if index in self._in_flight]
        self._probes = 1
        self._patience_s = min(MAX_PATIENCE_S, max(RESEND_S, 3 * (now - self._news_at)))
        self._news_at = now
        self._requeue([index for index, number in self._in_flight.items() if number < max(arrived, default=0)])

    def _on_silence(self, now: float) -> None:
        oldest = list(self._in_flight)[: self._probes]
        self._probes *= 2
        self._patience_s = min(MAX_PATIENCE_S, 2 * self._patience_s)
        self._news_at = now
        self._requeue(oldest)

    def _requeue(self, indices: list[int]) -> None:
        for index in indices:
            del self._in_flight[index]
        self._waiting.extendleft(reversed(indices))

    def _read(self, index: int) -> bytes:
        start, length = chunk_bounds(self.offer, index)
        try:
            payload = os.pread(self._file.fileno(), length, start)
        except OSError as error:
            raise SiteError(f"a file being sent cannot be read: {error}", advice="check the disk") from error
        if len(payload) != length:
            raise SiteError("a file being sent became shorter", advice="make the offer again")
        return payload

    def _parse_bitmap(self, progress: TransferProgress) -> int:
        if progress.transfer_id != self.offer.transfer_id:
            raise LinkError(f"progress is of transfer {progress.transfer_id}, not {self.offer.transfer_id}")
        bitmap = progress.received_bitmap
        received = int.from_bytes(bitmap, "little")
        if len(bitmap) not in (0, bitmap_bytes(self._count)) or received >> self._count:
            raise LinkError(f"progress of {len(bitmap)} bytes does not fit a transfer of {self._count} chunks")
        return received


class Incoming:
    """Receives one file into a folder. The caller passes on every chunk and publishes `bitmap` when it is due.

    The caller bounds how many transfers one peer may hold open, and drops those it refuses.
    """

    def __init__(self, part_file: PartFile) -> None:
        """Use `Incoming.open`."""
        self.offer = part_file.offer
        self._part_file = part_file
        self._news = True  # something to report; at first: "go"
        self._reported_at = float("-inf")
        self._quiet_s = 1.0
        self._synced_at = float("-inf")

    @classmethod
    def open(cls, folder: Path, offer: TransferOffer, *, max_bytes: int) -> "Incoming":
        """Start the transfer or resume it from the disk.

        Raises LinkError if it is larger than allowed, SiteError if the disk has no room for it.
        """
        if offer.size > max_bytes:
            raise LinkError(
                f"{offer.kind} of {offer.size} bytes exceeds the {max_bytes} bytes allowed",
                advice="raise the limit if this size is expected",
            )
        if chunk_count(offer) > MAX_CHUNKS:
            raise LinkError(f"{chunk_count(offer)} chunks of {offer.chunk_bytes} bytes are too many")
        return cls(PartFile.open(folder, offer))

    @property
    def bitmap(self) -> bytes:
        """Bit i, least significant first: chunk i is in the file."""
        return self._part_file.bitmap

    @property
    def complete(self) -> bool:
        """Every chunk is in the file; `finish` still checks the whole."""
        return self._part_file.missing == 0

    def on_chunk(self, chunk: bytes) -> None:
        """Write one frame's payload. A chunk that is already there is ignored.

        Raises LinkError if it does not belong here, SiteError if the disk refuses it.
        """
        transfer, index, payload = parse_frame(chunk)
        if transfer != self.offer.transfer_id or index >= chunk_count(self.offer):
            raise LinkError(f"chunk {index} of transfer {transfer} does not belong to {self.offer.transfer_id}")
        if len(payload) != chunk_bounds(self.offer, index)[1]:
            raise LinkError(f"chunk {index} of transfer {transfer} has {len(payload)} bytes")
        self._news = True  # also for a repeat: the sender seems not to know
        if self._part_file.write(index, payload):
            self._quiet_s = 1.0

    def on_offer(self) -> None:
        """The sender offers this transfer again: it was restarted or heard nothing. The next `progress_due` is true."""
        self._news = True
        self._quiet_s = 1.0

    def progress_due(self, now: float) -> bool:
        """True when the bitmap should be published. Asking counts as doing.

        At most every 50 ms with news; without, after 1 s, 2 s, … 30 s, so that a lost "go" or report heals itself.
        Once a second what arrived is made durable. Raises SiteError if the disk refuses that.
        """
        if now - self._synced_at >= SYNC_INTERVAL_S:
            self._part_file.sync()
            self._synced_at = now
        if now - self._reported_at < (PROGRESS_INTERVAL_S if self._news else self._quiet_s):
            return False
        if not self._news:
            self._quiet_s = min(MAX_QUIET_PROGRESS_S, 2 * self._quiet_s)
        self._news = False
        self._reported_at = now
        return True

    def finish(self) -> Path:
        """Give the whole file, durable, named `<id>.whole`; the caller moves or removes it.

        Raises LinkError if chunks are missing; TrustError if the digest is wrong, and the transfer then starts clean.
        """
        try:
            return self._part_file.finish()
        except TrustError:
            self._news = True
            raise

    def close(self) -> None:
        """Let go of the file; what is written stays for the next `open`."""
        self._part_file.close()

    def drop(self) -> None:
        """Remove everything this transfer has on disk: it was refused or is no longer wanted."""
        self._part_file.drop()


def _bits(bitmap: int) -> Iterator[int]:
    """Positions of the bits that are set, lowest first."""
    for position, byte in enumerate(bitmap.to_bytes(bitmap_bytes(bitmap.bit_length()), "little")):
        for bit in range(8):
            if byte >> bit & 1:
                yield position * 8 + bit
