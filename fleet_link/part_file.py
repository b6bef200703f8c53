"""The receiver's half-received file: data in `<id>.part`, what is there in `<id>.bitmap`, when whole `<id>.whole`.

Reads and writes these three files in one folder, and bounds that folder (`spooled_bytes`, `sweep`).
Never claims a chunk on disk before its data is durable: kill -9 or a power cut costs repeats, never a hole.
Source: ARCHITECTURE.md, "The link"; fdatasync(2) before the bits, fsync(2) of the folder after the rename.
"""

import hashlib
import os
import struct
from pathlib import Path

from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.files import sync_folder
from fleet_link.messages import TransferOffer

MAX_CHUNKS = 64 * 1024 * 8  # TransferProgress.received_bitmap holds 64 KiB
SYNC_BYTES = 8 * 1024**2  # data made durable in groups of this size
SUFFIXES = (".part", ".bitmap", ".whole", ".tmp")

_HEADER = struct.Struct(">8s32sQI")  # magic; SHA-256, size and chunk size of the offer the bitmap belongs to
_MAGIC = b"wrchunk1"


def chunk_count(offer: TransferOffer) -> int:
    return -(-offer.size // offer.chunk_bytes)


def chunk_bounds(offer: TransferOffer, index: int) -> tuple[int, int]:
    """Give (start, length) in bytes; the last chunk is shorter."""
    start = index * offer.chunk_bytes
    return start, min(offer.chunk_bytes, offer.size - start)


def bitmap_bytes(count: int) -> int:
    return (count + 7) // 8


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def spooled_bytes(folder: Path) -> int:
    """What the transfers in `folder` take on disk."""
    return sum(path.stat().st_size for path in _spooled(folder))


def sweep(folder: Path, *, older_than_unix_s: float) -> int:
    """Remove transfers that nothing was written to since then; give how many files went."""
    stale = [path for path in _spooled(folder) if path.stat().st_mtime < older_than_unix_s]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


class PartFile:
    """One transfer's files. `missing` counts the chunks that are not in the file yet."""

    def __init__(self, folder: Path, offer: TransferOffer) -> None:
        """Use `PartFile.open`."""
        self.offer = offer
        self._folder = folder
        self._part_path = folder / f"{offer.transfer_id}.part"
        self._bitmap_path = folder / f"{offer.transfer_id}.bitmap"
        self._whole_path = folder / f"{offer.transfer_id}.whole"
        self._part = -1
        self._unsynced_bytes = 0
        self._set_bits(0)

    @classmethod
    def open(cls, folder: Path, offer: TransferOffer) -> "PartFile":
        """Create the files or resume from what they hold. Raises SiteError if the disk has no room."""
        part_file = cls(folder, offer)
        try:
            part_file._open()
        except OSError as error:
            part_file.close()
            raise _disk_error(error) from error
        return part_file

    @property
    def bitmap(self) -> bytes:
        """Bit i, least significant first: chunk i is in the file."""
        return bytes(self._bits)

    def write(self, index: int, payload: bytes) -> bool:
        """Put a chunk in its place; False if it was there. Raises SiteError if the disk refuses it."""
        if self._bits[index >> 3] >> (index & 7) & 1:
            return False
        try:
            written = os.pwrite(self._part, payload, index * self.offer.chunk_bytes)
        except OSError as error:
            raise _disk_error(error) from error
        if written != len(payload):
            raise SiteError("a chunk could not be written whole", advice="free disk space or check the disk")
        self._bits[index >> 3] |= 1 << (index & 7)
        self.missing -= 1
        self._unsynced_bytes += written
        if self._unsynced_bytes >= SYNC_BYTES or self.missing == 0:
            self.sync()
        return True

    def sync(self) -> None:
        """Make data durable, then write the bits that claim it.

        The bits are written in place: they only ever turn on, so a torn write claims less, never more. Raises SiteError.
        """
        if not self._unsynced_bytes:
            return
        try:
            os.fdatasync(self._part)
            with self._bitmap_path.open("r+b") as file:
                file.seek(_HEADER.size)
                file.write(self._bits)
        except OSError as error:
            raise _disk_error(error) from error
        self._unsynced_bytes = 0

    def finish(self) -> Path:
        """Check the digest and give `<id>.whole`, durable.

        Raises LinkError if chunks are missing; TrustError if the digest is wrong: everything is then dropped and
        the transfer begins anew.
        """
        if self.missing:
            raise LinkError(f"transfer {self.offer.transfer_id} lacks {self.missing} chunks")
        self.close()
        try:
            path = self._whole_path if self._whole_path.exists() else self._part_path
            if file_sha256(path) != self.offer.sha256:
                self._begin()
                raise TrustError(
                    f"{self.offer.kind} of transfer {self.offer.transfer_id} arrived whole with a wrong digest",
                    advice="fetched again from the start; if that repeats, the sender's disk or file is damaged",
                )
            path.rename(self._whole_path)
            self._bitmap_path.unlink(missing_ok=True)
            sync_folder(self._folder)
        except OSError as error:
            raise _disk_error(error) from error
        return self._whole_path

    def close(self) -> None:
        """Let go of the file; what is written stays for the next `open`."""
        if self._part >= 0:
            os.close(self._part)
            self._part = -1

    def drop(self) -> None:
        """Remove everything this transfer has on disk."""
        self.close()
        for path in (self._bitmap_path, self._part_path, self._whole_path):
            path.unlink(missing_ok=True)

    def _open(self) -> None:
        if self._whole_path.exists() and self._whole_path.stat().st_size == self.offer.size:
            self._set_bits((1 << chunk_count(self.offer)) - 1)  # finished before a restart
        elif not self._resume():
            self._begin()

    def _begin(self) -> None:
        self.drop()
        self._set_bits(0)
        self._part = os.open(self._part_path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.posix_fallocate(self._part, 0, self.offer.size)  # a full disk shows now, not in the middle
        temporary = self._bitmap_path.with_suffix(".tmp")
        temporary.write_bytes(self._header() + self._bits)
        temporary.rename(self._bitmap_path)

    def _resume(self) -> bool:
        """True if both files are there and belong to this very offer."""
        try:
            state, part_size = self._bitmap_path.read_bytes(), self._part_path.stat().st_size
        except FileNotFoundError:
            return False
        bits = int.from_bytes(state[_HEADER.size :], "little")
        fits = len(state) == _HEADER.size + len(self._bits) and not bits >> chunk_count(self.offer)
        if not fits or part_size != self.offer.size or not state.startswith(self._header()):
            return False
        self._part = os.open(self._part_path, os.O_RDWR)
        self._set_bits(bits)
        return True

    def _set_bits(self, bits: int) -> None:
        count = chunk_count(self.offer)
        self._bits = bytearray(bits.to_bytes(bitmap_bytes(count), "little"))
        self.missing = count - bits.bit_count()

    def _header(self) -> bytes:
        offer = self.offer
        return _HEADER.pack(_MAGIC, bytes.fromhex(offer.sha256), offer.size, offer.chunk_bytes)


def _spooled(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in SUFFIXES]


def _disk_error(error: OSError) -> SiteError:
    return SiteError(f"the transfer folder cannot be written: {error}", advice="free disk space or check the disk")
