"""A box that is killed while it trains, and comes back two releases later: its update is in a sum once, scaled as it is old.

One real box, three twins that fill the buffer without it, and a real hub that goes on.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from benchmarks.house import Box, House
from benchmarks.processes import Daemon, HouseError, wait_for
from cloud_hub import ledger
from fleet_link import messages
from fleet_link.messages import ReleaseOffer, RoundPlan
from models import addable, delta
from models.bundle import SUFFIX, read_bundle
from tests.cloud_hub.masked_twin import layout_of, mean_of
from tests.crash_support import Mortal, Point, dying_with_words, hurry_hub, plain_words, teach, words_path
from tests.twin_support import Twins, hub_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUND_TIMEOUT_S = 240.0
BOX = "north-1"
SETTINGS: dict[str, object] = {"pacs.enabled": False, "hub.heartbeat_s": 1.0, "policy.min_examples": 1}
KEPT = "edge_agent.ledger:apply"
PLAN = ("--min-examples", "1", "--epochs", "1", "--trainable", "heads", "--clip-norm", "0.01", "--buffer", "3")

MISSES = Point("before", KEPT, 1, "prepared")  # trained, not kept: where it dies in the round that goes on without it
DIES = [
    Point("before", KEPT, 1, "prepared"),  # late: trained once more, not kept
    Point("after", KEPT, 1, "prepared"),  # in the spool, and the round over here
    Point("before", KEPT, 1, "prepared"),  # of the round that has room: found in the spool, no keys said
    Point("after", "edge_agent.spool:drop"),  # sealed, not committed: sealed once more
    Point("after", KEPT, 1, "sealed"),
]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path / "house") as house:
        house.hub.init()
        hurry_hub(house)
        house.hub.start()
        house.hub.wait_ready()
        house.hub.fleet("site", "add", "north")
        box = house.add_box(BOX, "north", SETTINGS)
        house.enroll(box)
        box.add_user("reader", "phantoms-only")
        command = [sys.executable, "-m", "tests.plain_words", *plain_words(house, box)]
        box.daemon = Daemon(command, box.daemon.log_path)
        box.start()
        box.wait_ready()
        yield house


@pytest.fixture
def twins(house: House) -> Iterator[Twins]:
    made = Twins(house, "a-1", "b-1", "c-1")  # before the box by name: the canaries
    yield made
    made.close()


def test_a_stale_update_is_in_one_sum_scaled(house: House, twins: Twins) -> None:
    (box,) = house.boxes
    teach(box, house.folder / "scanner", per_label=2)
    absent = Mortal("box", [MISSES], lambda point: dying_with_words(house, box, point), box.daemon)
    absent.start()
    wait_for("box", lambda: box.listening, timeout_s=60.0)
    first = _start(house, twins, BOX, "a-1", "b-1", "c-1")
    _until(twins, "death of the box", absent.has_died)
    _until_released(house, twins, first)
    _until_released(house, twins, _start(house, twins, BOX, "a-1", "b-1", "c-1"))
    assert _member(house, first)["state"] == "left"

    mortal = Mortal("box", DIES, lambda point: dying_with_words(house, box, point), box.daemon)
    mortal.start()
    third = ""
    kept = b""

    def is_over() -> bool:
        nonlocal third, kept
        if mortal.has_died():
            mortal.revive()
        waits = [path for path in (box.data_dir / "spool").glob("*.safetensors") if box.query("SELECT 1 FROM spool")]
        if not third and waits and _is_up_to_date(box):
            kept = waits[0].read_bytes()
            third = _start(house, twins, BOX, "a-1", "b-1")
        if not third:
            return False
        shown = hub_row(house, "SELECT state, reason FROM rounds WHERE round_id = ?", third)
        assert shown["state"] != "dropped", shown["reason"]
        closed = box.query("SELECT 1 FROM rounds WHERE round_id = ? AND state = 'closed'", third)
        return shown["state"] == "released" and bool(closed) and not mortal.waits_for

    try:
        _until(twins, "end of the third round", is_over)
    except HouseError as error:
        error.add_note(f"death to come: {mortal.waits_for}; round {third}")
        raise
    _check_sum(house, twins, third)
    _check_scaled(house, third, kept)
    (stale,) = box.query("SELECT round_id, staleness FROM stale_updates")
    assert stale == {"round_id": third, "staleness": 2}
    assert (box.query("SELECT 1 FROM spool"), box.query("SELECT 1 FROM masked_parts")) == ([], [])
    counted = "SELECT count(counted_at) AS n FROM round_devices WHERE device = ?"
    assert hub_row(house, counted, BOX)["n"] == 1
    assert hub_row(house, "SELECT reason FROM round_devices WHERE round_id = ? AND device = ?", first, BOX) == {
        "reason": ledger.LATE
    }


def _check_sum(house: House, twins: Twins, round_id: str) -> None:
    row = hub_row(house, "SELECT base_digest, candidate_digest FROM rounds WHERE round_id = ?", round_id)
    plain = [np.load(words_path(house)), *(twin.words for twin in twins.masked[:2] if twin.words is not None)]
    assert len(plain) == 3
    mean = mean_of(_plan(house, round_id), plain)
    before, after = (
        read_bundle(house.hub.data_dir / "releases" / f"{row[name]}{SUFFIX}").weights
        for name in ("base_digest", "candidate_digest")
    )
    expected = delta.apply(before, mean)
    assert all(np.array_equal(after[name], expected[name]) for name in expected)


def _check_scaled(house: House, round_id: str, kept: bytes) -> None:
    """What was sent is the spooled change, clipped, over √3: two releases lie between its base and the round's."""
    layout = layout_of(_plan(house, round_id))
    words = np.load(words_path(house))
    sent = addable.decode_sum(words, layout, boxes=1)
    clipped, _ = delta.clip(safetensors_numpy.load(kept), layout.clip_norm)
    bound = 3.0 * addable.error_bound(layout, boxes=1, weight_share=int(words[0]) / 255)
    error = {name: sent[name] - clipped[name] / np.float32(np.sqrt(3.0)) for name in sent}
    unscaled = {name: sent[name] - clipped[name] for name in sent}
    assert delta.norm(error) < bound < delta.norm(unscaled)


def _start(house: House, twins: Twins, *devices: str) -> str:
    twins.join_masked_rounds()
    named = [word for device in devices for word in ("--device", device)]
    return str(house.hub.fleet("round", "start", *PLAN, *named)["round_id"])


def _until_released(house: House, twins: Twins, round_id: str) -> None:
    """And given to everybody, so that the next round is over it."""

    def is_base() -> bool:
        shown = hub_row(house, "SELECT state, reason FROM rounds WHERE round_id = ?", round_id)
        assert shown["state"] != "dropped", shown["reason"]
        made = "SELECT count(*) AS n FROM releases WHERE round_id = ? AND state = 'everyone'"
        return bool(hub_row(house, made, round_id)["n"])

    _until(twins, "release of the round", is_base)


def _until(twins: Twins, what: str, fact: object) -> None:
    def probe() -> bool:
        twins.step()
        for box in twins.boxes:
            offer = max(box.of(ReleaseOffer), key=lambda each: each.release_version, default=None)
            if offer is not None and offer.release_version > box.release_version:
                box.bundle_digest, box.release_version = offer.bundle_digest, offer.release_version
                box.report(offer.release_version, offer.bundle_digest, "activated")
                box.heartbeat()
        return bool(fact())  # type: ignore[operator]

    wait_for(what, probe, timeout_s=ROUND_TIMEOUT_S, every_s=0.02)


def _member(house: House, round_id: str) -> dict[str, object]:
    return hub_row(house, "SELECT state FROM round_devices WHERE round_id = ? AND device = ?", round_id, BOX)


def _is_up_to_date(box: Box) -> bool:
    return bool(box.query("SELECT 1 FROM bundles WHERE state = 'active' AND release_version = 3"))


def _plan(house: House, round_id: str) -> RoundPlan:
    plan = messages.decode(hub_row(house, "SELECT plan FROM rounds WHERE round_id = ?", round_id)["plan"])
    assert isinstance(plan, RoundPlan)
    return plan
