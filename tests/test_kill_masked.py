"""kill -9 of a box and the hub at each durable step of a masked round: the sum is that of the plain updates, to the last bit.

One real box and two twins: without the shares of all three no mask comes off, so a step lost or taken twice ends the round.
"""

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.house import Box, House
from benchmarks.processes import Daemon, HouseError, wait_for
from edge_agent import masking
from edge_agent.masking import Part
from fleet_link import messages
from fleet_link.messages import RoundPlan
from models import delta
from models.bundle import SUFFIX, read_bundle
from tests.cloud_hub.masked_twin import mean_of
from tests.crash_support import (
    Mortal,
    Point,
    dying_hub,
    dying_with_words,
    hurry_hub,
    plain_words,
    teach,
    words_path,
)
from tests.privacy_support import found_in
from tests.twin_support import Twins, hub_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUND_TIMEOUT_S = 400.0
SETTINGS: dict[str, object] = {
    "pacs.enabled": False,
    "hub.heartbeat_s": 1.0,
    "policy.min_examples": 1,
}
KEPT = "edge_agent.ledger:apply"  # what moves the box's row, in one transaction
SAID = "cloud_hub.intake:Intake.took"  # what stores a box's word
SETTLED = "cloud_hub.ledger:_advance_once"  # who goes on to the next stage, in the hub's transaction

# (where the box dies, one death after the other; where the hub does) in the same round
CASES = {
    "up-to-the-update": (
        [
            Point("after", "edge_agent.masked:begin"),  # secrets drawn, not kept
            Point("after", KEPT, 1, "admitted"),  # keys in the outbox
            Point("before", KEPT, 1, "cohort-entered"),  # shares made, not kept
            Point("after", KEPT, 1, "cohort-entered"),
            Point("before", KEPT, 1, "shares-opened"),
            Point("after", KEPT, 1, "shares-opened"),
            Point("before", KEPT, 1, "sealed"),  # masked and on disk, no row: it trains again
            Point("after", KEPT, 1, "sealed"),
            Point("after", KEPT, 1, "accepted"),
            Point("before", KEPT, 1, "closed-by-hub"),
            Point("after", KEPT, 1, "closed-by-hub"),
        ],
        [
            Point("after", SAID, 1, "RoundKeys"),  # stored, no receipt
            Point("after", SETTLED, 1, "Settled"),  # the cohort is formed, not committed
            Point("after", SAID, 1, "Shares"),
            Point("after", SETTLED, 1, "Settled"),  # who has shared, not committed
            Point("after", "cloud_hub.intake:move_durably"),  # the update in its place, no row
        ],
    ),
    "from-the-update-on": (
        [
            Point("before", KEPT, 1, "accepted"),  # counted by the hub, not yet known here
            Point("before", KEPT, 1, "survivors-signed"),
            Point("after", KEPT, 1, "survivors-signed"),
            Point("before", KEPT, 1, "unmask-given"),
            Point("after", KEPT, 1, "unmask-given"),
            Point("before", "edge_agent.database:forget_on_disk"),  # closed; the secrets are in the log of the database
        ],
        [
            Point("after", "cloud_hub.intake:Intake.take_update"),  # counted, no receipt
            Point("after", SETTLED, 1, "Settled"),  # the survivors, not committed
            Point("after", SAID, 1, "SurvivorsSigned"),
            Point("after", SAID, 1, "Unmask"),
            Point("before", "cloud_hub.secure_sum:unmask"),
        ],
    ),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A hub that waits long and repeats itself soon, and one box that has reviewed X-rays."""
    with House(tmp_path_factory.mktemp("kill-masked") / "house") as house:
        house.hub.init()
        hurry_hub(house)
        house.hub.start()
        house.hub.wait_ready()
        house.hub.fleet("site", "add", "north")
        box = house.add_box("north-1", "north", SETTINGS)
        house.enroll(box)
        box.add_user("reader", "phantoms-only")
        box.daemon = Daemon([sys.executable, "-m", "tests.plain_words", *plain_words(house, box)], box.daemon.log_path)
        box.start()
        box.wait_ready()
        yield house


@pytest.fixture(scope="module")
def twins(house: House) -> Iterator[Twins]:
    made = Twins(house, "south-1", "west-1")
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES)
def test_masked_round_survives(house: House, twins: Twins, case: str) -> None:
    (box,) = house.boxes
    number = list(CASES).index(case)
    # New verdicts for each round: over one base a box joins no second sum without.
    teach(box, house.folder / "scanner" / case, per_label=2, first_seed=50 + 10 * number)
    box_dies, hub_dies = CASES[case]
    mortals = [
        Mortal("box", box_dies, lambda point: dying_with_words(house, box, point), box.daemon),
        Mortal("hub", hub_dies, lambda point: dying_hub(house.hub, point), house.hub.daemon),
    ]
    for mortal in mortals:
        mortal.start()
    wait_for("hub", lambda: house.hub.listening, timeout_s=60.0)
    round_id = _start_round(house, twins)
    secrets: set[bytes] = set()

    def is_over() -> bool:
        twins.step()
        for mortal in mortals:
            if mortal.has_died():
                if mortal.name == "box":
                    secrets.update(_secrets(box, round_id))
                mortal.revive()
        shown = hub_row(house, "SELECT state, reason FROM rounds WHERE round_id = ?", round_id)
        assert shown["state"] != "dropped", shown["reason"]
        return shown["state"] == "released" and _is_closed(box, round_id) and not any(m.waits_for for m in mortals)

    try:
        wait_for("end of the round", is_over, timeout_s=ROUND_TIMEOUT_S, every_s=0.02)
    except HouseError as error:
        error.add_note(f"deaths to come: {[mortal.waits_for for mortal in mortals]}")
        raise
    box.wait_ready()
    _check_sum(house, twins, round_id)
    _check_as_if_nothing_had_happened(house, twins, round_id)
    _check_forgotten(box, secrets)


def _start_round(house: House, twins: Twins) -> str:
    twins.join_masked_rounds()
    options = ("--min-examples", "1", "--epochs", "1", "--trainable", "heads", "--clip-norm", "1")
    return str(house.hub.fleet("round", "start", *options)["round_id"])


def _check_sum(house: House, twins: Twins, round_id: str) -> None:
    row = hub_row(house, "SELECT plan, base_digest, candidate_digest FROM rounds WHERE round_id = ?", round_id)
    plan = messages.decode(row["plan"])
    assert isinstance(plan, RoundPlan)
    words = np.load(words_path(house))
    assert np.count_nonzero(words) > 1  # it has learned, and weighs something
    mean = mean_of(plan, [words, *(twin.words for twin in twins.masked if twin.words is not None)])
    before, after = (
        read_bundle(house.hub.data_dir / "releases" / f"{row[name]}{SUFFIX}").weights
        for name in ("base_digest", "candidate_digest")
    )
    expected = delta.apply(before, mean)
    assert all(np.array_equal(after[name], expected[name]) for name in expected)


def _check_as_if_nothing_had_happened(house: House, twins: Twins, round_id: str) -> None:
    (box,) = house.boxes
    shown = house.hub.fleet("round", "show", round_id)
    assert {member["device"]: member["state"] for member in shown["members"]} == dict.fromkeys(
        ("north-1", "south-1", "west-1"), "unmasked"
    )
    refusals = house.hub.fleet("refusals")
    assert [refusal for refusal in refusals if refusal["what"] != "connection"] == []  # TLS that was cut off may be one
    waiting = "SELECT message_id FROM link_outbox UNION ALL SELECT transfer_id FROM transfers_out"

    def all_receipted() -> bool:
        twins.step()
        return not box.query(waiting)

    wait_for("receipt of everything the box said", all_receipted, timeout_s=30.0)
    assert list((box.data_dir / "updates").iterdir()) == []


def _check_forgotten(box: Box, secrets: set[bytes]) -> None:
    """Of the round: from the row, the database's free pages and its log."""
    assert len(secrets) >= 7  # its own three, and two shares of each twin
    assert box.query("SELECT 1 FROM masked_parts") == []
    assert _files_with(box, secrets) == []


def _secrets(box: Box, round_id: str) -> set[bytes]:
    """What the killed box's part holds; the search for it finds it."""
    rows = box.query("SELECT part FROM masked_parts WHERE round_id = ?", round_id)
    held = {secret for row in rows for secret in _of_part(masking.decode(row["part"]))}
    assert not held or _files_with(box, held)
    return held


def _files_with(box: Box, secrets: set[bytes]) -> list[str]:
    return [path.name for path in sorted(box.data_dir.glob("box.db*")) if found_in(path, secrets)]


def _of_part(part: Part) -> Iterator[bytes]:
    yield from (part.secrets.mask_secret, part.secrets.self_secret, part.secrets.share_key)
    for pair in part.held.values():
        yield from (pair.of_self_secret, pair.of_mask_secret)


def _is_closed(box: Box, round_id: str) -> bool:
    return bool(box.query("SELECT 1 FROM rounds WHERE round_id = ? AND state = 'closed'", round_id))
