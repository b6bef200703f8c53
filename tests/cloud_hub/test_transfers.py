"""Updates coming in, one message at a time: an offer that comes again."""

from pathlib import Path
from typing import Literal, cast

from cloud_hub.intake import Intake
from cloud_hub.transfers import Transfers
from fleet_link import chunks
from fleet_link.messages import AnyMessage, TransferOffer, TransferProgress
from tests.cloud_hub.hub_support import make_hub_files


class WillingIntake:
    """Takes every update."""

    def judge_update(self, device: str, offer: TransferOffer) -> tuple[Literal["take"], str]:
        return "take", ""

    def update_bytes_max(self, round_id: str) -> int:
        return 1 << 20


def test_an_offer_that_comes_again_is_answered_at_once(tmp_path: Path) -> None:
    """The box was restarted and waits for a "go"; by itself the hub would say nothing for up to 30 s."""
    files = make_hub_files(tmp_path)
    files.add_device("box-1", "north")
    said: list[AnyMessage] = []
    receiving = Transfers(
        files.config,
        files.database,
        cast(Intake, WillingIntake()),
        lambda device, message: said.append(message),
        lambda device, frame: True,
    )
    update = tmp_path / "update"
    update.write_bytes(b"sealed")
    offer = chunks.new_offer(update, kind="update", subject="r1", transfer_id="5" * 32, message_id="5" * 32)
    receiving.on_offer("box-1", offer, 100.0)
    receiving.receive_due(100.0)
    receiving.receive_due(100.1)
    assert len(said) == 1
    receiving.on_offer("box-1", offer, 100.1)
    receiving.receive_due(100.1)
    receiving.close()
    assert [type(message) for message in said] == [TransferProgress, TransferProgress]
