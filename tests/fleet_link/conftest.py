"""Fixtures of the link's tests: one throw-away CA, a real broker, a plan.

Reads nothing; writes into pytest's temporary folders.
Never shared with other packages: they import mosquitto_support themselves.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_link.messages import RoundPlan
from fleet_link.sealing import SealingKey, new_sealing_key, public_bytes
from tests.fleet_link.mosquitto_support import Mosquitto, TestAuthority


@pytest.fixture(scope="session")
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture
def broker(tmp_path: Path, authority: TestAuthority) -> Iterator[Mosquitto]:
    folder = tmp_path / "broker"
    folder.mkdir()
    mosquitto = Mosquitto(folder, authority)
    mosquitto.start()
    yield mosquitto
    mosquitto.kill()


@pytest.fixture(scope="session")
def sealing_key(tmp_path_factory: pytest.TempPathFactory) -> SealingKey:
    return new_sealing_key(tmp_path_factory.mktemp("sealing") / "sealing.key")


@pytest.fixture(scope="session")
def plan(sealing_key: SealingKey) -> RoundPlan:
    return RoundPlan(
        message_id="0" * 32,
        round_id="round-1",
        kind="unsafe_open",
        base_digest="a" * 64,
        rule="fedavg",
        trainable="all",
        clip_norm=1.0,
        epochs=2,
        learning_rate=0.001,
        min_examples=4,
        seed=7,
        sealing_key=public_bytes(sealing_key),
        deadline_unix_s=2_000_000_000.0,
    )
