"""An open round of a share, from the order to the release: real hub, broker and box, which both die in between."""

import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from benchmarks.house import House
from benchmarks.processes import wait_for
from fleet_link import messages, sealing
from models import delta, round_layout
from models.bundle import SHIPPED, read_bundle
from tests.crash_support import Point, dying_box, dying_hub, taught_house

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS: dict[str, object] = {
    "pacs.enabled": False,
    "hub.heartbeat_s": 1.0,
    "policy.allow_unsafe_open_rounds": True,
    "policy.min_examples": 1,
    "learning.heldout_fraction": 0.4,
}
ORDER = ("--unsafe-open", "--share", "0.036", "--bits", "3", "--epochs", "1", "--learning-rate", "0.0005")
FOR_ONE_BOX = ("--min-devices", "1", "--min-examples", "1")


@pytest.fixture
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with taught_house(tmp_path_factory.mktemp("share") / "house", SETTINGS) as house:
        yield house


def plan_of(house: House, round_id: str) -> messages.RoundPlan:
    with closing(sqlite3.connect(house.hub.data_dir / "hub.db")) as db:
        (body,) = db.execute("SELECT plan FROM rounds WHERE round_id = ?", (round_id,)).fetchone()
    plan = messages.decode(body)
    assert isinstance(plan, messages.RoundPlan)
    return plan


def test_drawn_weights_are_trained_travel_in_a_two_hundredth_and_are_released(house: House) -> None:
    """The box dies with its update sealed in memory; the hub with it in the sum and no row."""
    (box,) = house.boxes
    mortal = {
        "box": dying_box(box, Point("after", "edge_agent.update:build")),
        "hub": dying_hub(house.hub, Point("after", "cloud_hub.collection:Collection.add")),
    }
    anew = {"box": box.daemon, "hub": house.hub.daemon}
    for name, daemon in anew.items():
        daemon.stop()
        mortal[name].start()
    wait_for("hub", lambda: house.hub.listening, timeout_s=60.0)
    round_id = str(house.hub.fleet("round", "start", *ORDER, *FOR_ONE_BOX)["round_id"])
    try:
        for name in mortal:
            wait_for(f"the death of the {name}", lambda name=name: not mortal[name].running, timeout_s=240.0)  # type: ignore[misc]
            assert mortal[name].wait_end(1.0) == -signal.SIGKILL, mortal[name].tail()
            anew[name].start()
        wait_for("hub", lambda: house.hub.listening, timeout_s=60.0)
        ended = ("released", "dropped")
        wait_for("end", lambda: house.hub.fleet("round", "show", round_id)["state"] in ended, timeout_s=120.0)
    finally:
        for daemon in mortal.values():
            daemon.stop()

    shown, plan = house.hub.fleet("round", "show", round_id), plan_of(house, round_id)
    assert (shown["state"], shown["reason"], shown["share"], shown["bits"]) == ("released", "", 0.036, 3)
    assert house.hub.fleet("refusals") == []
    before = read_bundle(SHIPPED).weights
    after = read_bundle(house.hub.data_dir / "releases" / f"{shown['candidate_digest']}.bundle").weights
    names = delta.trainable_names(before, "all")
    codec = round_layout.codec_of(plan, sealing.plan_digest(plan), {name: before[name].shape for name in names})
    assert codec is not None
    masks = codec.drawn.masks()
    moved = {name: after[name] != before[name] for name in before}
    assert not any((moved[name] & ~masks[name]).any() if name in masks else moved[name].any() for name in moved)
    assert sum(np.count_nonzero(one) for one in moved.values()) > 0.1 * codec.drawn.chosen
    (member,) = shown["members"]
    print(f"{4 * codec.drawn.size} bytes of float32, {member['bytes_received']} sealed and received")
    assert 4 * codec.drawn.size / member["bytes_received"] > 200
