"""Who is offered a release: the canaries alone, then everybody, or nobody once it is halted."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest

from cloud_hub.rollout import Decision, DeviceFacts, Stage, next_offers

OLD, NEW = "0" * 64, "1" * 64


def device(name: str, *, runs: str = OLD, outcome: str = "", healthy: bool = True, silent: bool = False) -> DeviceFacts:
    well = healthy and not silent and runs != ""
    return DeviceFacts(name, runs, well, silent, outcome)


def decide(
    stage: Stage, devices: Sequence[DeviceFacts], *, chosen: Collection[str] = (), canaries: int = 1
) -> Decision:
    return next_offers(stage, NEW, devices, chosen=chosen, canaries=canaries)


OTHERS = [device("north-2"), device("south-1")]
FLEET = [*OTHERS, device("north-1")]
ACTIVE = device("north-1", runs=NEW, outcome="activated")
ON = {"chosen": ("north-1",)}


# --- who is the canary ----------------------------------------------------------------------------


def test_only_the_canary_is_offered_at_first() -> None:
    assert decide(Stage.CANARY, FLEET) == Decision(Stage.CANARY, ("north-1",), ("north-1",))


def test_as_many_canaries_as_configured() -> None:
    assert decide(Stage.CANARY, FLEET, canaries=2).offers == ("north-1", "north-2")
    two = decide(Stage.CANARY, [*OTHERS, ACTIVE], chosen=("north-1", "north-2"), canaries=2)
    assert two == Decision(Stage.CANARY, ("north-1", "north-2"), ("north-2",))


@pytest.mark.parametrize(
    "ill",
    [device("aaa", runs=""), device("aaa", healthy=False), device("aaa", silent=True)],
    ids=["never heard", "alarmed", "silent"],
)
def test_ill_device_is_not_chosen_whatever_its_name(ill: DeviceFacts) -> None:
    assert decide(Stage.CANARY, [ill, *FLEET]) == Decision(Stage.CANARY, ("north-1",), ("north-1",))


def test_nobody_is_chosen_while_nobody_is_well() -> None:
    assert decide(Stage.CANARY, [device("a", silent=True), device("b", healthy=False)]) == Decision(
        Stage.CANARY, (), ()
    )


def test_chosen_once_whoever_comes_later() -> None:
    fleet = [device("aaa"), *FLEET]
    assert decide(Stage.CANARY, fleet, chosen=("south-1",)) == Decision(Stage.CANARY, ("south-1",), ("south-1",))


def test_canary_that_goes_silent_before_it_reported_is_replaced_by_a_healthy_one() -> None:
    fleet = [device("north-1", silent=True), device("north-2", healthy=False), device("south-1")]
    assert decide(Stage.CANARY, fleet, **ON) == Decision(Stage.CANARY, ("south-1",), ("south-1",))


def test_silent_canary_stays_while_there_is_no_other() -> None:
    fleet = [device("north-1", silent=True), device("north-2", silent=True)]
    assert decide(Stage.CANARY, fleet, **ON).canaries == ("north-1",)


def test_revoked_canary_is_replaced() -> None:
    assert decide(Stage.CANARY, OTHERS, **ON) == Decision(Stage.CANARY, ("north-2",), ("north-2",))


def test_canary_that_has_said_something_stays_and_holds_the_release_when_it_goes_silent() -> None:
    said = replace(ACTIVE, silent=True, healthy=False)
    assert decide(Stage.CANARY, [*OTHERS, said], **ON) == Decision(Stage.CANARY, ("north-1",), ())


def test_canary_whose_report_was_lost_is_asked_again_and_replaced_when_it_goes_silent() -> None:
    runs_it = device("north-1", runs=NEW)
    assert decide(Stage.CANARY, [*OTHERS, runs_it], **ON) == Decision(Stage.CANARY, ("north-1",), ("north-1",))
    silent = device("north-1", runs=NEW, silent=True)
    assert decide(Stage.CANARY, [*OTHERS, silent], **ON) == Decision(Stage.CANARY, ("north-2",), ("north-2",))


def test_canary_with_an_alarm_stays_and_holds_the_release() -> None:
    fleet = [*OTHERS, device("north-1", healthy=False)]
    assert decide(Stage.CANARY, fleet, **ON) == Decision(Stage.CANARY, ("north-1",), ("north-1",))


# --- what becomes of the release ------------------------------------------------------------------


def test_everybody_once_the_canary_runs_it() -> None:
    assert decide(Stage.CANARY, [*OTHERS, ACTIVE], **ON) == Decision(
        Stage.EVERYONE, ("north-1",), ("north-2", "south-1")
    )


def test_unhealthy_canary_holds_the_release_back() -> None:
    assert decide(Stage.CANARY, [*OTHERS, replace(ACTIVE, healthy=False)], **ON).stage is Stage.CANARY


def test_report_alone_is_not_enough_before_the_heartbeat_shows_it() -> None:
    assert decide(Stage.CANARY, [*OTHERS, replace(ACTIVE, bundle_digest=OLD)], **ON).stage is Stage.CANARY


def test_heartbeat_alone_passes_nothing() -> None:
    liar = device("aaa", runs=NEW)
    assert decide(Stage.CANARY, [liar, *OTHERS]) == Decision(Stage.CANARY, ("north-2",), ("north-2",))
    assert decide(Stage.CANARY, [liar, *OTHERS], chosen=("aaa",)).stage is Stage.CANARY


@pytest.mark.parametrize("outcome", ["refused", "rolled-back"])
def test_canary_that_refuses_halts_the_release_with_its_reason(outcome: str) -> None:
    refusing = replace(device("north-1", outcome=outcome), reason="held-out accuracy fell")
    expected = Decision(Stage.HALTED, ("north-1",), (), f"canary north-1 {outcome}: held-out accuracy fell")
    assert decide(Stage.CANARY, [*OTHERS, refusing], **ON) == expected


def test_second_canary_that_refuses_halts_as_well_and_so_does_one_that_was_replaced() -> None:
    refusing = device("north-2", outcome="refused")
    fleet = [ACTIVE, refusing, device("south-1")]
    assert decide(Stage.CANARY, fleet, chosen=("north-1", "north-2"), canaries=2).stage is Stage.HALTED
    assert decide(Stage.CANARY, fleet, **ON).stage is Stage.HALTED


def test_halted_release_is_offered_to_nobody() -> None:
    assert decide(Stage.HALTED, FLEET).offers == ()


def test_later_newcomer_is_offered_the_release_of_everybody() -> None:
    assert decide(Stage.EVERYONE, [ACTIVE, device("late")]).offers == ("late",)


def test_refusal_by_one_of_everybody_does_not_halt() -> None:
    fleet = [device("a", outcome="refused"), device("b")]
    assert decide(Stage.EVERYONE, fleet) == Decision(Stage.EVERYONE, (), ("b",))


def test_nobody_is_asked_again_who_has_reported_or_runs_it() -> None:
    fleet = [device("a", outcome="refused"), device("b", runs=NEW), device("c", runs=NEW, outcome="activated")]
    assert decide(Stage.EVERYONE, fleet).offers == ()


def test_bundle_that_everybody_runs_already_needs_no_offer() -> None:
    fleet = [device("a", runs=NEW), device("b", runs=NEW, silent=True), device("new", runs="")]
    assert decide(Stage.CANARY, fleet) == Decision(Stage.EVERYONE, (), ("new",))


def test_empty_fleet_waits() -> None:
    assert decide(Stage.CANARY, []) == Decision(Stage.CANARY, (), ())
