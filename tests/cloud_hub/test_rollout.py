"""Who is offered a release: the canaries alone, then everybody, or nobody once it is halted."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cloud_hub.rollout import Decision, DeviceFacts, Stage, next_offers

OLD, NEW = "0" * 64, "1" * 64


def device(name: str, *, runs: str = OLD, outcome: str = "", healthy: bool = True) -> DeviceFacts:
    return DeviceFacts(name, runs, healthy, outcome)


def decide(stage: Stage, devices: Sequence[DeviceFacts], canaries: int = 1) -> Decision:
    return next_offers(stage, NEW, devices, canaries=canaries)


OTHERS = [device("north-2"), device("south-1")]
FLEET = [*OTHERS, device("north-1")]
ACTIVE = device("north-1", runs=NEW, outcome="activated")


def test_only_the_first_by_name_is_offered_at_first() -> None:
    assert decide(Stage.CANARY, FLEET) == Decision(Stage.CANARY, ("north-1",))


def test_as_many_canaries_as_configured() -> None:
    assert decide(Stage.CANARY, FLEET, canaries=2).offers == ("north-1", "north-2")
    assert decide(Stage.CANARY, [*OTHERS, ACTIVE], canaries=2) == Decision(Stage.CANARY, ("north-2",))


def test_device_never_heard_from_is_not_the_canary() -> None:
    assert decide(Stage.CANARY, [*FLEET, device("aaa", runs="")]).offers == ("north-1",)


def test_everybody_once_the_canary_runs_it() -> None:
    assert decide(Stage.CANARY, [*OTHERS, ACTIVE]) == Decision(Stage.EVERYONE, ("north-2", "south-1"))


def test_unhealthy_canary_holds_the_release_back() -> None:
    assert decide(Stage.CANARY, [*OTHERS, replace(ACTIVE, healthy=False)]) == Decision(Stage.CANARY, ())


def test_report_alone_is_not_enough_before_the_heartbeat_shows_it() -> None:
    assert decide(Stage.CANARY, [*OTHERS, replace(ACTIVE, bundle_digest=OLD)]).stage is Stage.CANARY


@pytest.mark.parametrize("outcome", ["refused", "rolled-back"])
def test_canary_that_refuses_halts_the_release_with_its_reason(outcome: str) -> None:
    refusing = replace(device("north-1", outcome=outcome), reason="held-out accuracy fell")
    expected = Decision(Stage.HALTED, (), f"canary north-1 {outcome}: held-out accuracy fell")
    assert decide(Stage.CANARY, [*OTHERS, refusing]) == expected


def test_second_canary_that_refuses_halts_as_well() -> None:
    refusing = device("north-2", outcome="refused")
    assert decide(Stage.CANARY, [ACTIVE, refusing, device("south-1")], canaries=2).stage is Stage.HALTED


def test_halted_release_is_offered_to_nobody() -> None:
    assert decide(Stage.HALTED, FLEET).offers == ()


def test_later_newcomer_is_offered_the_release_of_everybody() -> None:
    assert decide(Stage.EVERYONE, [ACTIVE, device("late")]).offers == ("late",)


def test_newcomer_with_an_earlier_name_does_not_take_the_canary_back() -> None:
    assert decide(Stage.CANARY, [ACTIVE, device("aaa")]) == Decision(Stage.EVERYONE, ("aaa",))


def test_refusal_by_one_of_everybody_does_not_halt() -> None:
    fleet = [device("a", outcome="refused"), device("b")]
    assert decide(Stage.EVERYONE, fleet) == Decision(Stage.EVERYONE, ("b",))


def test_nobody_is_asked_again_who_has_reported_or_runs_it() -> None:
    fleet = [device("a", outcome="refused"), device("b", runs=NEW), device("c", runs=NEW, outcome="activated")]
    assert decide(Stage.EVERYONE, fleet).offers == ()


def test_bundle_that_everybody_runs_already_needs_no_offer() -> None:
    assert decide(Stage.CANARY, [device("a", runs=NEW), device("b", runs=NEW)]) == Decision(Stage.EVERYONE, ())


def test_empty_fleet_waits() -> None:
    assert decide(Stage.CANARY, []) == Decision(Stage.CANARY, ())
