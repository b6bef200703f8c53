"""Bundles coming in, one message at a time: a disk that refuses, an offer that comes again; updates going out."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import bundles, ledger, transfers
from edge_agent.transfers import Transfers
from fleet_link import chunks
from fleet_link.errors import SiteError
from fleet_link.messages import AnyMessage, TransferOffer, TransferProgress, TransferReceipt
from models.bundle import file_digest
from tests.edge_agent.link_support import Box, make_box, write_brightness_bundle
from tests.fleet_link.mosquitto_support import TestAuthority

AUTHORITY = TestAuthority()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = make_box(tmp_path, AUTHORITY)
    yield made
    made.db.close()


@pytest.fixture
def said() -> list[AnyMessage]:
    return []


@pytest.fixture
def receiving(box: Box, said: list[AnyMessage]) -> Iterator[Transfers]:
    made = Transfers(box.db, box.data_dir, said.append, lambda frame: True)
    made.repair(time.time())
    yield made
    made.close()


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    path = tmp_path / "candidate.bundle"
    write_brightness_bundle(path, slope=20.0, version="2")
    return path


def offer_of(box: Box, bundle: Path) -> TransferOffer:
    digest = file_digest(bundle)
    box.db.execute("INSERT INTO bundles VALUES (?, 2, ?, 'offered', '', 0)", (digest, bundles.path_of(digest)))
    return chunks.new_offer(bundle, kind="bundle", subject=digest, transfer_id="5" * 32, message_id="5" * 32)


def bring_all(receiving: Transfers, offer: TransferOffer, bundle: Path) -> None:
    content = bundle.read_bytes()
    for index in range(0, -(-offer.size // offer.chunk_bytes)):
        start = index * offer.chunk_bytes
        receiving.on_chunk(chunks.frame(offer.transfer_id, index, content[start : start + offer.chunk_bytes]))


def state_of(box: Box, offer: TransferOffer) -> str:
    return next(row["state"] for row in box.rows("bundles") if row["bundle_digest"] == offer.subject)


def test_an_offer_that_comes_again_is_answered_at_once(
    box: Box, receiving: Transfers, said: list[AnyMessage], candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender was restarted and waits for a "go"; by itself the receiver would say nothing for up to 30 s."""
    moment = time.monotonic()
    monkeypatch.setattr("edge_agent.transfers.time.monotonic", lambda: moment)
    offer = offer_of(box, candidate)
    receiving.on_offer(offer)
    receiving.receive_due(time.time())
    moment += 0.1
    receiving.receive_due(time.time())
    assert len(said) == 1
    receiving.on_offer(offer)
    receiving.receive_due(time.time())
    assert [type(message) for message in said] == [TransferProgress, TransferProgress]


def test_a_disk_that_refuses_the_whole_file_is_tried_again(
    box: Box,
    receiving: Transfers,
    said: list[AnyMessage],
    candidate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = box.data_dir / "bundles"
    folder.rename(tmp_path / "aside")
    folder.write_bytes(b"no folder")
    offer = offer_of(box, candidate)
    receiving.on_offer(offer)
    bring_all(receiving, offer, candidate)
    with pytest.raises(SiteError, match="cannot be written") as caught:
        receiving.receive_due(time.time())
    assert "free space" in caught.value.advice
    assert state_of(box, offer) == "offered"
    receiving.on_offer(offer)  # every two seconds, too soon
    receiving.receive_due(time.time())
    folder.unlink()
    (tmp_path / "aside").rename(folder)
    later = time.monotonic() + transfers.RETRY_S
    monkeypatch.setattr("edge_agent.transfers.time.monotonic", lambda: later)
    receiving.on_offer(offer)
    receiving.receive_due(time.time())
    assert state_of(box, offer) == "fetched"
    assert (box.data_dir / bundles.path_of(offer.subject)).read_bytes() == candidate.read_bytes()
    (receipt,) = [message for message in said if isinstance(message, TransferReceipt)]
    assert receipt.accepted


def test_an_update_that_cannot_be_read_does_not_hold_up_the_others(box: Box, said: list[AnyMessage]) -> None:
    (box.data_dir / "updates").mkdir()
    for name in ("bad", "good"):
        path = box.data_dir / "updates" / f"{name}.sealed"
        path.mkdir() if name == "bad" else path.write_bytes(b"sealed")
        row = (name[0] * 32, "update", name, f"updates/{name}.sealed", "a" * 64, path.stat().st_size, 0.0)
        box.db.execute("INSERT INTO transfers_out VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    sending = Transfers(box.db, box.data_dir, said.append, lambda frame: True)
    with pytest.raises(SiteError):
        sending.load_outgoing(time.time())
    sending.send_due()
    sending.close()
    assert [message.subject for message in said if isinstance(message, TransferOffer)] == ["good"]


def test_the_same_update_has_the_same_transfer(box: Box) -> None:
    path = box.data_dir / "r.sealed"
    path.write_bytes(b"sealed")
    first = ledger.offer_of(path, "r0001-0123abcd", "box-1")
    assert ledger.offer_of(path, "r0001-0123abcd", "box-1") == first
    assert ledger.offer_of(path, "r0001-0123abcd", "box-2").transfer_id != first.transfer_id
