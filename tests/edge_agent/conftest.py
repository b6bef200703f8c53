"""Fixtures of masked rounds: one fleet of boxes for each test, three hospitals' data for each file.

Writes below the folder that pytest gives.
Never asserts.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.edge_agent.buffered_fleet import plan_is
from tests.edge_agent.masked_fleet import Fleet, Hospitals
from tests.masked_support import changed


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    return Hospitals.build(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture
def make(hospitals: Hospitals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def a_fleet(**fields: object) -> Fleet:
        fleet = Fleet(hospitals, tmp_path, monkeypatch, **fields)  # type: ignore[arg-type]
        made.append(fleet)
        return fleet

    yield a_fleet
    for fleet in made:
        fleet.close()


@pytest.fixture
def make_buffered(make: Callable[..., Fleet]) -> Callable[..., Fleet]:
    """A fleet whose round is buffered, over the base of all."""

    def a_fleet(**fields: object) -> Fleet:
        fleet = make(**fields)
        plan_is(fleet, changed(fleet.plan, buffer=5, bases=(fleet.plan.base_digest,)))
        return fleet

    return a_fleet
