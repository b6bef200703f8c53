"""The export child: its word is checked, its failure has a reason, the real one agrees with torch."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_hub import candidate
from cloud_hub.candidate import EXPORT, CandidateError, Export, Order
from models import delta, weights_file
from models.bundle import SHIPPED, read_bundle
from tests.cloud_hub.round_support import TWIN, TWIN_EXPORT, failing_export, needs_bundle

pytestmark = needs_bundle


@pytest.fixture
def mean() -> dict[str, NDArray[np.float32]]:
    weights = read_bundle(SHIPPED).weights
    return {name: np.full(weights[name].shape, 0.01, np.float32) for name in delta.trainable_names(weights, "heads")}


@pytest.fixture
def running() -> Iterator[list[Export]]:
    exports: list[Export] = []
    yield exports
    for export in exports:
        export.stop()


def finish(export: Export) -> Path:
    until = time.monotonic() + 120.0
    while (bundle := export.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return bundle


def order(folder: Path, command: tuple[str, ...]) -> Order:
    return Order(folder, SHIPPED, "r0001", 60.0, command)


def check(bundle_path: Path, mean: dict[str, NDArray[np.float32]]) -> None:
    base, made = read_bundle(SHIPPED), read_bundle(bundle_path)
    assert (made.manifest.name, made.manifest.version) == (base.manifest.name, "r0001")
    for name, before in base.weights.items():
        assert np.array_equal(made.weights[name], before + mean.get(name, np.float32(0.0))), name


def test_bundle_of_the_mean(tmp_path: Path, mean: dict[str, NDArray[np.float32]]) -> None:
    check(finish(Export(order(tmp_path, TWIN_EXPORT), mean)), mean)
    candidate.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_real_export_agrees_with_torch(tmp_path: Path, mean: dict[str, NDArray[np.float32]]) -> None:
    check(finish(Export(order(tmp_path, EXPORT), mean)), mean)


@pytest.mark.slow
def test_real_export_says_why_it_refuses(tmp_path: Path, mean: dict[str, NDArray[np.float32]]) -> None:
    poisoned = mean | {sorted(mean)[0]: np.full(mean[sorted(mean)[0]].shape, np.inf, np.float32)}
    with pytest.raises(CandidateError, match="is not finite"):
        finish(Export(order(tmp_path, EXPORT), poisoned))


def test_mean_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="not a tensor of these weights"):
        Export(order(tmp_path, TWIN_EXPORT), {"head.evil": np.zeros(3, np.float32)})


def test_a_full_disk_is_no_fault_of_the_base(
    tmp_path: Path, mean: dict[str, NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round waits for room: what its boxes brought is not thrown away."""
    write = weights_file.write_moved
    monkeypatch.setattr(weights_file, "write_moved", lambda base, change, _: write(base, change, Path("/dev/full")))
    with pytest.raises(OSError, match="No space left"):
        Export(order(tmp_path, TWIN_EXPORT), mean)


@pytest.mark.parametrize(
    ("twin", "reason"),
    [
        (TWIN.replace("write_bundle(Path(given.out), parts)", "'0' * 64"), "gave no bundle"),
        (TWIN.replace("print(json.dumps(", "str(("), "gave no report"),
        (TWIN.replace('"digest": write', '"digest": "0" * 64, "real": write'), "is not the one reported"),
    ],
)
def test_child_that_lies_is_found_out(
    tmp_path: Path, mean: dict[str, NDArray[np.float32]], twin: str, reason: str
) -> None:
    assert twin != TWIN
    with pytest.raises(CandidateError, match=reason):
        finish(Export(order(tmp_path, failing_export(twin)), mean))


def test_child_that_hangs_is_ended(tmp_path: Path, mean: dict[str, NDArray[np.float32]], running: list[Export]) -> None:
    seconds = [0.0]
    command = failing_export("import time; time.sleep(600)")
    export = Export(order(tmp_path, command), mean, seconds=lambda: seconds[0])
    running.append(export)
    seconds[0] = 60.0
    assert export.poll() is None
    seconds[0] = 60.1
    with pytest.raises(CandidateError, match="longer than 60 s"):
        export.poll()
    assert export._child.poll() is not None


def test_stop_ends_the_child_and_twice_is_once(tmp_path: Path, mean: dict[str, NDArray[np.float32]]) -> None:
    export = Export(order(tmp_path, failing_export("import time; time.sleep(600)")), mean)
    export.stop()
    export.stop()
    assert export._child.poll() is not None
