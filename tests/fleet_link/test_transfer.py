"""Megabytes through a real Mosquitto while the broker, the sender or the receiver is killed -9 in mid-transfer."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.fleet_link.mosquitto_support import Mosquitto, TestAuthority
from tests.fleet_link.transfer_support import BOX, HUB, EndConfig

pytestmark = pytest.mark.slow

SIZE = 10 * 1024**2 + 123
CHUNKS = 161
ROOT = Path(__file__).resolve().parents[2]


class Child:
    """One end in its own process."""

    def __init__(self, config: EndConfig) -> None:
        command = [sys.executable, "-m", "tests.fleet_link.transfer_support", json.dumps(asdict(config))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def read_until(self, word: str, at_least: int = 0) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said, *rest = line.split()
            if said == word and (word != "progress" or int(rest[0]) >= at_least):
                return rest
        raise AssertionError(f"ended without saying {word}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Transfer:
    def __init__(self, broker: Mosquitto, folder: Path) -> None:
        self.broker = broker
        self.source = folder / "update"
        self.source.write_bytes(os.urandom(SIZE))
        self.spool = folder / "spool"
        self.spool.mkdir()
        self.children: list[Child] = []

    def sender(self, pace_s: float = 0.01) -> Child:
        return self._child(EndConfig("send", str(self.broker.folder), self.broker.port, str(self.source), pace_s))

    def receiver(self) -> Child:
        return self._child(EndConfig("receive", str(self.broker.folder), self.broker.port, str(self.spool)))

    def _child(self, config: EndConfig) -> Child:
        self.children.append(Child(config))
        return self.children[-1]

    def check_whole(self, receiver: Child, sender: Child) -> int:
        """Give how many bytes the sender's last process has sent."""
        (whole,) = receiver.read_until("done")
        assert Path(whole).read_bytes() == self.source.read_bytes()
        assert [path.suffix for path in self.spool.iterdir()] == [".whole"]
        return int(sender.read_until("done")[1])

    def claimed(self) -> int:
        """How many chunks the bitmap on disk claims; each must be in the part file."""
        (bitmap_path,), (part_path,) = self.spool.glob("*.bitmap"), self.spool.glob("*.part")
        bits = int.from_bytes(bitmap_path.read_bytes()[-((CHUNKS + 7) // 8) :], "little")
        source, part = self.source.read_bytes(), part_path.read_bytes()
        for index in range(CHUNKS):
            if bits >> index & 1:
                place = slice(index * 65_536, (index + 1) * 65_536)
                assert part[place] == source[place]
        return bits.bit_count()


@pytest.fixture
def transfer(broker: Mosquitto, authority: TestAuthority, tmp_path: Path) -> Iterator[Transfer]:
    broker.config(authority.issue(BOX))
    broker.config(authority.issue(HUB))
    transfer = Transfer(broker, tmp_path)
    yield transfer
    for child in transfer.children:
        child.kill()


def test_arrives_whole_and_once(transfer: Transfer) -> None:
    receiver, sender = transfer.receiver(), transfer.sender(pace_s=0)
    assert transfer.check_whole(receiver, sender) < 1.5 * SIZE


def test_the_broker_is_killed_twice_in_mid_transfer(transfer: Transfer) -> None:
    receiver, sender = transfer.receiver(), transfer.sender()
    for at_least in (30, 90):
        (count,) = receiver.read_until("progress", at_least)
        transfer.broker.kill()
        assert int(count) < CHUNKS
        transfer.broker.start()
    transfer.check_whole(receiver, sender)


def test_the_receiver_is_killed_and_goes_on_from_its_disk(transfer: Transfer) -> None:
    receiver, sender = transfer.receiver(), transfer.sender(pace_s=0.03)
    (count,) = receiver.read_until("progress", 80)
    receiver.kill()
    assert int(count) < CHUNKS
    claimed = transfer.claimed()
    assert 0 < claimed <= CHUNKS
    again = transfer.receiver()
    (first,) = again.read_until("progress")
    assert int(first) == claimed
    transfer.check_whole(again, sender)


def test_the_sender_is_killed_and_sends_only_the_rest(transfer: Transfer) -> None:
    receiver, sender = transfer.receiver(), transfer.sender()
    receiver.read_until("progress", 80)
    sender.kill()
    sent = transfer.check_whole(receiver, transfer.sender(pace_s=0))
    assert sent < SIZE * 0.6


def test_everything_is_killed_at_once(transfer: Transfer) -> None:
    receiver, sender = transfer.receiver(), transfer.sender(pace_s=0.03)
    receiver.read_until("progress", 60)
    transfer.broker.kill()
    receiver.kill()
    sender.kill()
    assert transfer.claimed() > 0
    transfer.broker.start()
    transfer.check_whole(transfer.receiver(), transfer.sender(pace_s=0))
