"""Updates coming in, one message at a time: an offer that comes again."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import pytest
from sqlalchemy import func, select

from cloud_hub.database import Transfer
from cloud_hub.intake import Intake
from cloud_hub.transfers import Transfers
from fleet_link import chunks
from fleet_link.errors import SiteError
from fleet_link.messages import AnyMessage, TransferOffer, TransferProgress
from tests.cloud_hub.hub_support import HubFiles, make_hub_files


class WillingIntake:
    """Takes every update."""

    def judge_update(self, device: str, offer: TransferOffer, now: float) -> tuple[Literal["take"], str]:
        return "take", ""

    def update_bytes_max(self, round_id: str) -> int:
        return 1 << 20


def taking(
    files: HubFiles, say: Callable[[str, AnyMessage], None], seconds: Callable[[], float] = time.monotonic
) -> Transfers:
    return Transfers(files.config, files.database, cast(Intake, WillingIntake()), say, lambda *_: True, seconds)


def test_an_offer_that_comes_again_is_answered_at_once(tmp_path: Path) -> None:
    """The box was restarted and waits for a "go"; by itself the hub would say nothing for up to 30 s."""
    files = make_hub_files(tmp_path)
    files.add_device("box-1", "north")
    said: list[AnyMessage] = []
    seconds = [100.0]
    receiving = taking(files, lambda device, message: said.append(message), lambda: seconds[0])
    update = tmp_path / "update"
    update.write_bytes(b"sealed")
    offer = chunks.new_offer(update, kind="update", subject="r1", transfer_id="5" * 32, message_id="5" * 32)
    receiving.on_offer("box-1", offer, 100.0)
    receiving.receive_due(100.0)
    seconds[0] = 100.1
    receiving.receive_due(100.1)
    assert len(said) == 1
    receiving.on_offer("box-1", offer, 100.1)
    receiving.receive_due(100.1)
    receiving.close()
    assert [type(message) for message in said] == [TransferProgress, TransferProgress]


def test_one_transfer_s_trouble_holds_no_other_up(tmp_path: Path) -> None:
    files = make_hub_files(tmp_path)
    said: list[str] = []
    receiving = taking(files, lambda device, message: said.append(device))
    update = tmp_path / "update"
    update.write_bytes(bytes(300_000))
    for number, device in enumerate(("box-1", "box-2"), 1):
        files.add_device(device, "north")
        offer = chunks.new_offer(update, kind="update", subject="r1", transfer_id=f"{number}" * 32, message_id="5" * 32)
        receiving.on_offer(device, offer, 100.0)
        sending = chunks.Outgoing(update, offer)
        sending.on_progress(
            TransferProgress(message_id="5" * 32, transfer_id=offer.transfer_id, received_bitmap=b""), 100.0
        )
        receiving.on_chunk(device, next(iter(sending.due(100.0)))[1])
        sending.close()
    shutil.rmtree(files.config.paths.rounds / "r1" / "incoming" / "box-1")
    with pytest.raises(SiteError):
        receiving.receive_due(100.0)
    assert said == ["box-2"]
    receiving.receive_due(100.1)  # the one in trouble is let go: its box offers it again
    receiving.close()


def test_offers_under_ever_new_names_leave_one_row_and_nothing_in_memory(tmp_path: Path) -> None:
    files = make_hub_files(tmp_path)
    files.add_device("box-1", "north")
    receiving = taking(files, lambda device, message: None)
    update = tmp_path / "update"
    update.write_bytes(b"sealed")
    for number in range(50):
        name = f"{number:032x}"
        offer = chunks.new_offer(update, kind="update", subject="r1", transfer_id=name, message_id=name)
        receiving.on_offer("box-1", offer, 100.0)
    receiving.close()
    with files.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Transfer)) == 1
    assert len(receiving._row_at) == len(receiving._incoming) == 1


def test_a_clock_that_goes_back_holds_no_progress_up(tmp_path: Path) -> None:
    files = make_hub_files(tmp_path)
    files.add_device("box-1", "north")
    said: list[AnyMessage] = []
    seconds = [0.0]
    receiving = taking(files, lambda device, message: said.append(message), lambda: seconds[0])
    update = tmp_path / "update"
    update.write_bytes(b"sealed")
    offer = chunks.new_offer(update, kind="update", subject="r1", transfer_id="5" * 32, message_id="5" * 32)
    receiving.on_offer("box-1", offer, 7200.0)
    receiving.receive_due(7200.0)
    seconds[0] = 1.0
    receiving.on_offer("box-1", offer, 3601.0)
    receiving.receive_due(3601.0)
    receiving.close()
    assert len(said) == 2
