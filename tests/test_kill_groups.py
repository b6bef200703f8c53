"""kill -9 of the hub at each durable step of a masked round in groups, one of them poisoned: the release is that of no kill.

Twelve twins and no real box: what a box does is the same in a round of one sum (tests/test_kill_masked.py).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.house import House
from benchmarks.processes import HouseError, wait_for
from fleet_link import messages
from fleet_link.messages import RoundPlan
from models import delta
from models.bundle import SUFFIX, read_bundle
from tests.cloud_hub.masked_twin import MaskedTwin, plain_mean
from tests.crash_support import Mortal, Point, dying_hub
from tests.twin_support import Twins, hub_row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HUB_SETTINGS = {"stage_s = 60 ": "stage_s = 300", "resend_s = 5.0": "resend_s = 1.0"}
NAMES = tuple(f"south-{number:02}" for number in range(1, 13))
POISONER = NAMES[6]
SAID = "cloud_hub.intake:Intake.took"
SETTLED = "cloud_hub.ledger:_advance_once"
POINTS = [
    Point("after", SETTLED, 1, "Settled"),  # the groups are formed, not committed
    Point("after", SAID, 1, "Shares"),
    Point("after", SETTLED, 1, "Settled"),  # who has shared, not committed
    Point("after", "cloud_hub.intake:move_durably", 2),  # an update in its place, no row
    Point("after", SETTLED, 1, "Settled"),  # every group's survivors, not committed
    Point("after", SAID, 2, "SurvivorsSigned"),
    Point("after", SAID, 2, "Unmask"),
    Point("before", "cloud_hub.secure_sum:unmask", 3),  # two groups are opened, and in memory alone
    Point("after", "cloud_hub.masked:end_groups"),  # the poisoned group's reason, not committed
    Point("before", "cloud_hub.intake:bucketed"),  # committed; the others are opened once more
]


class AnyWords(MaskedTwin):
    """A box whose update is drawn by chance."""

    def encoded(self, plan: RoundPlan) -> NDArray[np.unsignedinteger]:
        honest = super().encoded(plan)
        return np.random.default_rng(5).integers(0, 1 << plan.word_bits, len(honest), honest.dtype)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path / "house") as house:
        house.hub.init()
        path = house.hub.data_dir / "hub.toml"
        text = path.read_text()
        for before, after in HUB_SETTINGS.items():
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        path.write_text(text)
        house.hub.start()
        house.hub.wait_ready()
        house.hub.fleet("site", "add", "north")
        yield house


@pytest.fixture
def twins(house: House) -> Iterator[Twins]:
    made = Twins(house, *NAMES)
    made.join_masked_rounds()
    for box in made.boxes:
        if box.identity.name == POISONER:
            box.masked = AnyWords(box.identity, box.trust)
    yield made
    made.close()


def test_a_round_in_groups_survives(house: House, twins: Twins) -> None:
    hub = Mortal("hub", POINTS, lambda point: dying_hub(house.hub, point), house.hub.daemon)
    hub.start()
    wait_for("hub", lambda: house.hub.listening, timeout_s=60.0)
    options = ("--groups", "4", "--rule", "median", "--min-examples", "1", "--trainable", "heads", "--clip-norm", "10")
    round_id = str(house.hub.fleet("round", "start", *options)["round_id"])

    def is_over() -> bool:
        twins.step()
        if hub.has_died():
            hub.revive()
        shown = hub_row(house, "SELECT state, reason FROM rounds WHERE round_id = ?", round_id)
        assert shown["state"] != "dropped", shown["reason"]
        return shown["state"] == "released" and not hub.waits_for

    try:
        wait_for("end of the round", is_over, timeout_s=400.0, every_s=0.02)
    except HouseError as error:
        error.add_note(f"death to come: {hub.waits_for}")
        raise
    wait_for("hub", lambda: house.hub.listening, timeout_s=60.0)
    _check_release(house, twins, round_id)
    refusals = house.hub.fleet("refusals")
    assert [refusal for refusal in refusals if refusal["what"] != "connection"] == []


def _check_release(house: House, twins: Twins, round_id: str) -> None:
    """The median of the groups' plain means, without the poisoned one, to the last bit."""
    row = hub_row(house, "SELECT plan, base_digest, candidate_digest FROM rounds WHERE round_id = ?", round_id)
    plan = messages.decode(row["plan"])
    assert isinstance(plan, RoundPlan)
    shown = house.hub.fleet("round", "show", round_id)
    assert {member["state"] for member in shown["members"]} == {"unmasked"}
    (spoiled,) = (cohort for cohort in shown["cohorts"] if cohort["reason"])
    assert POISONER in spoiled["devices"]
    by_name = {twin.identity.name: twin for twin in twins.masked}
    means = [
        plain_mean(plan, [by_name[name] for name in cohort["devices"]])
        for cohort in shown["cohorts"]
        if cohort is not spoiled
    ]
    median = {name: np.median(np.stack([mean[name] for mean in means]), axis=0) for name in means[0]}
    before, after = (
        read_bundle(house.hub.data_dir / "releases" / f"{row[name]}{SUFFIX}").weights
        for name in ("base_digest", "candidate_digest")
    )
    expected = delta.apply(before, median)
    assert len(means) == 3
    assert all(np.array_equal(after[name], expected[name]) for name in expected)
