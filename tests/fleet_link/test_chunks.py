"""Chunks over a pipe that loses, repeats and delays; both sides restarted; a clock made of numbers."""

import os
import random
from collections import deque
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fleet_link import chunks
from fleet_link.chunks import Incoming, Outgoing
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import TransferOffer, TransferProgress
from fleet_link.part_file import chunk_count, spooled_bytes, sweep

ID = "ab" * 16
LIMIT = 1024**3
TICK_S = 0.05
MOST_TICKS = 200_000


def make_file(folder: Path, size: int, seed: int = 1) -> Path:
    path = folder / f"source-{size}-{seed}"
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def make_offer(path: Path, chunk_bytes: int = 1024) -> TransferOffer:
    offer = chunks.new_offer(path, kind="update", subject="round-1", transfer_id=ID, message_id="0" * 32)
    return TransferOffer(
        **({name: getattr(offer, name) for name in offer.__struct_fields__} | {"chunk_bytes": chunk_bytes})
    )


def progress(incoming: Incoming) -> TransferProgress:
    return TransferProgress(message_id="1" * 32, transfer_id=ID, received_bitmap=incoming.bitmap)


def started(path: Path, offer: TransferOffer) -> Outgoing:
    outgoing = Outgoing(path, offer)
    outgoing.on_progress(TransferProgress(message_id="1" * 32, transfer_id=ID, received_bitmap=b""), 0.0)
    return outgoing


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


# --- frames and offers ----------------------------------------------------------------------------


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=100))
def test_frame_and_back(raw_id: bytes, index: int, payload: bytes) -> None:
    assert chunks.parse_frame(chunks.frame(raw_id.hex(), index, payload)) == (raw_id.hex(), index, payload)


@given(st.binary(max_size=20))
def test_a_frame_without_payload_is_refused(junk: bytes) -> None:
    with pytest.raises(LinkError):
        chunks.parse_frame(junk)


def test_the_same_file_for_the_same_purpose_has_the_same_id() -> None:
    first = chunks.transfer_id(kind="update", subject="round-1", sha256="a" * 64, sender="box-1")
    assert first == chunks.transfer_id(kind="update", subject="round-1", sha256="a" * 64, sender="box-1")
    assert len(bytes.fromhex(first)) == 16
    assert first != chunks.transfer_id(kind="update", subject="round-1", sha256="a" * 64, sender="box-2")


def test_an_offer_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="cannot be read"):
        make_offer(tmp_path / "missing")
    with pytest.raises(SiteError, match="cannot be transferred"):
        make_offer(make_file(tmp_path, 0))


# --- whole transfers ------------------------------------------------------------------------------


@given(
    size=st.integers(1, 40_000),
    loss=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    repeats=st.sampled_from([0.0, 0.3]),
    restarts=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**32),
)
@settings(
    max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)  # a seed does not shrink
def test_arrives_whole_whatever_the_pipe_does(
    tmp_path_factory: pytest.TempPathFactory, size: int, loss: float, repeats: float, restarts: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("transfer")
    path, dice = make_file(folder, size, seed % 7), random.Random(seed)
    offer = make_offer(path)
    outgoing, incoming = Outgoing(path, offer), Incoming.open(folder, offer, max_bytes=LIMIT)
    for tick in range(MOST_TICKS):
        if incoming.complete:
            break
        now = tick * TICK_S
        if dice.random() < restarts:
            outgoing.close()
            outgoing = Outgoing(path, offer)
        if dice.random() < restarts:
            incoming.close()
            incoming = Incoming.open(folder, offer, max_bytes=LIMIT)
        for _, frame in outgoing.due(now):
            for _ in range(1 + (dice.random() < repeats)):
                if dice.random() >= loss:
                    incoming.on_chunk(frame)
        if outgoing.offer_due(now) and dice.random() >= loss:
            incoming.on_offer()
        if incoming.progress_due(now) and dice.random() >= loss:
            outgoing.on_progress(progress(incoming), now)
    assert incoming.finish().read_bytes() == path.read_bytes()


def test_nothing_is_sent_before_the_receiver_said_go(tmp_path: Path) -> None:
    path = make_file(tmp_path, 5000)
    outgoing = Outgoing(path, make_offer(path))
    assert outgoing.offer_due(0.0)
    assert list(outgoing.due(0.0)) == []
    assert not outgoing.offer_due(1.9)
    assert outgoing.offer_due(2.0)


def test_without_loss_every_byte_is_sent_once(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 1_000_000)
    offer = make_offer(path)
    outgoing, incoming = started(path, offer), Incoming.open(spool, offer, max_bytes=LIMIT)
    for tick in range(MOST_TICKS):
        if outgoing.complete:
            break
        now = tick * TICK_S
        for _, frame in outgoing.due(now):
            incoming.on_chunk(frame)
        outgoing.on_progress(progress(incoming), now)
    assert outgoing.bytes_sent == 1_000_000 + 20 * chunk_count(offer)
    assert list(outgoing.due(1000.0)) == []


def test_no_more_than_the_window_is_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"")
    os.truncate(path, 3 * chunks.WINDOW_BYTES)
    outgoing = started(path, make_offer(path, chunks.CHUNK_BYTES))
    assert len(list(outgoing.due(0.0))) == chunks.WINDOW_BYTES // chunks.CHUNK_BYTES
    assert list(outgoing.due(0.5)) == []


def test_a_frame_that_was_not_taken_is_due_again(tmp_path: Path) -> None:
    path = make_file(tmp_path, 5000)
    outgoing = started(path, make_offer(path))
    first = next(outgoing.due(0.0))
    assert outgoing.bytes_sent == 0
    assert next(outgoing.due(0.0)) == first


def test_what_was_overtaken_goes_again_at_once(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 10 * 1024)
    offer = make_offer(path)
    outgoing, incoming = started(path, offer), Incoming.open(spool, offer, max_bytes=LIMIT)
    for index, frame in outgoing.due(0.0):
        if index not in (2, 5, 9):
            incoming.on_chunk(frame)
    outgoing.on_progress(progress(incoming), 0.1)
    assert [index for index, _ in outgoing.due(0.1)] == [2, 5]  # 9 was the last: it may still be on its way


def test_after_silence_one_chunk_then_two_then_four_go_again(tmp_path: Path) -> None:
    path = make_file(tmp_path, 10 * 1024)
    outgoing = started(path, make_offer(path))
    assert len(list(outgoing.due(0.0))) == 10
    assert list(outgoing.due(0.99)) == []
    assert [index for index, _ in outgoing.due(1.0)] == [0]
    assert list(outgoing.due(2.9)) == []
    assert [index for index, _ in outgoing.due(3.0)] == [1, 2]
    assert len(list(outgoing.due(7.0))) == 4


def test_a_line_slower_than_the_resend_time_is_not_filled_with_repeats(tmp_path: Path, spool: Path) -> None:
    """One chunk in 2.5 s and a queue of 128: repeats stay under a tenth of 600 chunks."""
    path = make_file(tmp_path, 600 * 1024)
    offer = make_offer(path)
    outgoing, incoming = Outgoing(path, offer), Incoming.open(spool, offer, max_bytes=LIMIT)
    line: deque[bytes] = deque()
    for tick in range(MOST_TICKS):
        if incoming.complete:
            break
        now = tick * TICK_S
        for _, frame in outgoing.due(now):
            if len(line) >= 128:
                break
            line.append(frame)
        if tick % 50 == 49 and line:
            incoming.on_chunk(line.popleft())
        if incoming.progress_due(now):
            outgoing.on_progress(progress(incoming), now)
    assert incoming.complete
    assert outgoing.bytes_sent < 1.1 * (600 * 1024 + 600 * 20)


def test_the_senders_restart_goes_on_where_the_receiver_is(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 10 * 1024)
    offer = make_offer(path)
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    for index, frame in started(path, offer).due(0.0):
        if index < 7:
            incoming.on_chunk(frame)
    again = Outgoing(path, offer)
    again.on_progress(progress(incoming), 1000.0)
    assert [index for index, _ in again.due(1000.0)] == [7, 8, 9]


def test_a_receiver_that_lost_chunks_gets_them_again(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 4 * 1024)
    offer = make_offer(path)
    outgoing, incoming = started(path, offer), Incoming.open(spool, offer, max_bytes=LIMIT)
    for _, frame in outgoing.due(0.0):
        incoming.on_chunk(frame)
    outgoing.on_progress(progress(incoming), 0.1)
    assert outgoing.complete
    incoming.drop()
    outgoing.on_progress(progress(Incoming.open(spool, offer, max_bytes=LIMIT)), 0.2)
    assert [index for index, _ in outgoing.due(0.2)] == [0, 1, 2, 3]


@pytest.mark.parametrize("bitmap", [b"\x00" * 3, b"\x00", b"\xff\xff"])
def test_a_progress_that_does_not_fit_changes_nothing(tmp_path: Path, bitmap: bytes) -> None:
    path = make_file(tmp_path, 10 * 1024)
    outgoing = started(path, make_offer(path))
    with pytest.raises(LinkError, match="does not fit"):
        outgoing.on_progress(TransferProgress(message_id="1" * 32, transfer_id=ID, received_bitmap=bitmap), 0.0)
    with pytest.raises(LinkError, match="progress is of transfer"):
        outgoing.on_progress(TransferProgress(message_id="1" * 32, transfer_id="0" * 32, received_bitmap=b""), 0.0)
    assert len(list(outgoing.due(0.0))) == 10


def test_a_file_that_changed_under_the_sender_is_the_sites_matter(tmp_path: Path) -> None:
    path = make_file(tmp_path, 10 * 1024)
    offer = make_offer(path)
    outgoing = started(path, offer)
    os.truncate(path, 512)
    with pytest.raises(SiteError, match="became shorter"):
        list(outgoing.due(0.0))
    with pytest.raises(SiteError, match="were offered"):
        Outgoing(path, offer)
    with pytest.raises(SiteError, match="cannot be read"):
        Outgoing(tmp_path / "missing", offer)


# --- what a receiver refuses ----------------------------------------------------------------------


def test_refuses_what_is_too_large_before_it_takes_disk(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 5000)
    with pytest.raises(LinkError, match="exceeds the 4999 bytes") as refused:
        Incoming.open(spool, make_offer(path), max_bytes=4999)
    assert "limit" in refused.value.advice
    huge = TransferOffer(
        message_id="0" * 32, transfer_id=ID, kind="update", subject="r", sha256="a" * 64, size=2**31, chunk_bytes=1024
    )
    with pytest.raises(LinkError, match="too many"):
        Incoming.open(spool, huge, max_bytes=2**32)
    assert list(spool.iterdir()) == []


def test_no_room_on_the_disk_is_the_sites_matter(tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SiteError, match="No space left"):
        Incoming.open(spool, make_offer(make_file(tmp_path, 5000)), max_bytes=LIMIT)


@pytest.mark.parametrize(
    ("transfer", "index", "length", "reason"),
    [
        (ID, 5, 904, "does not belong"),
        (ID, 2**32 - 1, 1024, "does not belong"),
        ("cd" * 16, 0, 1024, "does not belong"),
        (ID, 0, 1023, "has 1023 bytes"),
        (ID, 0, 1025, "has 1025 bytes"),
        (ID, 4, 1024, "has 1024 bytes"),
    ],
)
def test_refuses_each_wrong_chunk_and_goes_on(
    tmp_path: Path, spool: Path, transfer: str, index: int, length: int, reason: str
) -> None:
    path = make_file(tmp_path, 5000)
    offer = make_offer(path)
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    with pytest.raises(LinkError, match=reason):
        incoming.on_chunk(chunks.frame(transfer, index, b"x" * length))
    for _, frame in started(path, offer).due(0.0):
        incoming.on_chunk(frame)
    assert incoming.finish().read_bytes() == path.read_bytes()


@given(st.binary(max_size=60))
@settings(max_examples=50, deadline=None)
def test_random_chunks_are_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    folder = tmp_path_factory.mktemp("spool")
    incoming = Incoming.open(folder, make_offer(make_file(folder, 5000)), max_bytes=LIMIT)
    for frame in (junk, bytes.fromhex(ID) + junk):
        with pytest.raises(LinkError):
            incoming.on_chunk(frame)
    incoming.close()


def test_repeated_and_late_chunks_do_no_harm(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 5000)
    offer = make_offer(path)
    frames = [frame for _, frame in started(path, offer).due(0.0)]
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    incoming.on_chunk(frames[0])
    incoming.on_chunk(chunks.frame(ID, 0, b"x" * 1024))  # a repeat never overwrites
    for frame in frames[1:]:
        incoming.on_chunk(frame)
    whole = incoming.finish()
    incoming.on_chunk(frames[2])
    assert whole.read_bytes() == path.read_bytes()


def test_an_unfinished_transfer_is_not_handed_out(tmp_path: Path, spool: Path) -> None:
    incoming = Incoming.open(spool, make_offer(make_file(tmp_path, 5000)), max_bytes=LIMIT)
    with pytest.raises(LinkError, match="lacks 5 chunks"):
        incoming.finish()


def test_a_wrong_digest_drops_everything_and_starts_clean(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 5000)
    offer = make_offer(path)
    frames = [frame for _, frame in started(path, offer).due(0.0)]
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    incoming.on_chunk(chunks.frame(ID, 0, b"x" * 1024))
    for frame in frames:
        incoming.on_chunk(frame)
    with pytest.raises(TrustError, match="wrong digest"):
        incoming.finish()
    assert not incoming.complete
    assert incoming.bitmap == b"\x00"
    assert incoming.progress_due(0.0)
    for frame in frames:
        incoming.on_chunk(frame)
    assert incoming.finish().read_bytes() == path.read_bytes()


def test_progress_is_reported_at_once_then_every_50_ms_then_ever_more_seldom(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 5000)
    offer = make_offer(path)
    frames = [frame for _, frame in started(path, offer).due(0.0)]
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    assert incoming.progress_due(0.0)  # go
    incoming.on_chunk(frames[0])
    assert not incoming.progress_due(0.03125)
    assert incoming.progress_due(0.0625)
    assert [second for second in range(100) if incoming.progress_due(second + 0.0625)] == [1, 3, 7, 15, 31, 61, 91]
    incoming.on_chunk(frames[0])  # the sender seems not to know
    assert incoming.progress_due(99.2)
    assert not incoming.progress_due(99.5)
    incoming.on_offer()  # a restarted sender need not wait for the next quiet report
    assert incoming.progress_due(99.5)


# --- on the receiver's disk -----------------------------------------------------------------------


def test_the_bitmap_on_disk_claims_only_what_was_synced(
    tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each fdatasync of the data, the bits on disk are still those of the sync before."""
    path = make_file(tmp_path, 5 * 1024)
    offer = make_offer(path)
    state = spool / f"{ID}.bitmap"
    claims: list[int] = []
    real = os.fdatasync

    def recording(descriptor: int) -> None:
        claims.append(state.read_bytes()[-1])
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", recording)
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    for index, frame in started(path, offer).due(0.0):
        incoming.on_chunk(frame)
        incoming.progress_due(float(index))  # a second apart: each is synced
    assert claims == [0b0, 0b1, 0b11, 0b111, 0b1111]
    assert state.read_bytes()[-1] == 0b11111


@pytest.mark.parametrize("damage", ["cut", "longer", "foreign", "extra bits", "short part", "no part", "no bitmap"])
def test_files_that_do_not_fit_the_offer_start_clean(tmp_path: Path, spool: Path, damage: str) -> None:
    path = make_file(tmp_path, 5 * 1024)
    offer = make_offer(path)
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    frames = [frame for _, frame in started(path, offer).due(0.0)]
    incoming.on_chunk(frames[0])
    incoming.progress_due(0.0)
    incoming.close()
    state, part = spool / f"{ID}.bitmap", spool / f"{ID}.part"
    content = state.read_bytes()
    match damage:
        case "cut":
            state.write_bytes(content[:-1])
        case "longer":
            state.write_bytes(content + b"\x00")
        case "foreign":
            state.write_bytes(content[:10] + b"x" + content[11:])
        case "extra bits":
            state.write_bytes(content[:-1] + b"\xff")
        case "short part":
            os.truncate(part, 100)
        case "no part":
            part.unlink()
        case "no bitmap":
            state.unlink()
    again = Incoming.open(spool, offer, max_bytes=LIMIT)
    assert again.bitmap == b"\x00"
    for frame in frames:
        again.on_chunk(frame)
    assert again.finish().read_bytes() == path.read_bytes()


def test_another_file_under_the_same_id_starts_clean(tmp_path: Path, spool: Path) -> None:
    first, second = make_file(tmp_path, 5000, 1), make_file(tmp_path, 5000, 2)
    incoming = Incoming.open(spool, make_offer(first), max_bytes=LIMIT)
    incoming.on_chunk(next(started(first, make_offer(first)).due(0.0))[1])
    incoming.progress_due(0.0)
    incoming.close()
    assert Incoming.open(spool, make_offer(first), max_bytes=LIMIT).bitmap == b"\x01"
    assert Incoming.open(spool, make_offer(second), max_bytes=LIMIT).bitmap == b"\x00"


def test_a_finished_file_is_found_again_after_a_restart(tmp_path: Path, spool: Path) -> None:
    path = make_file(tmp_path, 5000)
    offer = make_offer(path)
    incoming = Incoming.open(spool, offer, max_bytes=LIMIT)
    for _, frame in started(path, offer).due(0.0):
        incoming.on_chunk(frame)
    incoming.finish()
    again = Incoming.open(spool, offer, max_bytes=LIMIT)
    assert again.complete
    assert again.bitmap == b"\x1f"
    whole = again.finish()
    assert list(spool.iterdir()) == [whole]
    whole.write_bytes(b"x" * 5000)  # damaged meanwhile
    with pytest.raises(TrustError):
        Incoming.open(spool, offer, max_bytes=LIMIT).finish()


def test_the_spool_is_counted_and_swept_by_age(tmp_path: Path, spool: Path) -> None:
    incoming = Incoming.open(spool, make_offer(make_file(tmp_path, 5000)), max_bytes=LIMIT)
    assert spooled_bytes(spool) > 5000
    for path in spool.iterdir():
        os.utime(path, (1000.0, 1000.0))
    (spool / "notes.txt").write_text("not a transfer")
    assert sweep(spool, older_than_unix_s=1000.0) == 0
    assert sweep(spool, older_than_unix_s=1001.0) == 2
    assert [path.name for path in spool.iterdir()] == ["notes.txt"]
    incoming.drop()
    assert spooled_bytes(spool) == 0
