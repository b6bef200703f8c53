"""Export: weights become a bundle whose graph says what torch says, or nothing."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from models.bundle import SHIPPED, Bundle, BundleParts, check_known_answer, file_digest, read_bundle, write_bundle
from models.errors import BundleError
from models.spec import Variant
from tests.models.conftest import one_series, session_of

pytest.importorskip("torch", reason="export needs the extra `train`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def changed(bundle: Bundle) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: value if name.startswith("ood_") else value + generator.normal(0, 1e-3, value.shape).astype(np.float32)
        for name, value in bundle.weights.items()
    }


def run_export(weights: Path, out: Path, base: Path = SHIPPED) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "models.export", "--bundle", str(base), "--weights", str(weights)]
    command += ["--name", "candidate", "--version", "2", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, shipped: Bundle) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("export")
    safetensors_numpy.save_file(changed(shipped), folder / "w.safetensors")
    done = run_export(folder / "w.safetensors", folder / "new.bundle")
    assert done.returncode == 0, done.stderr
    return folder / "new.bundle", json.loads(done.stdout)


def test_the_new_bundle_is_whole_and_says_where_it_comes_from(exported, shipped: Bundle) -> None:
    path, report = exported
    bundle = read_bundle(path)
    assert report["digest"] == bundle.digest == file_digest(path) != shipped.digest
    assert report["parity"] <= 1e-4
    assert report["base"] == shipped.digest
    assert report["variants_dropped"] == []
    assert (bundle.manifest.name, bundle.manifest.version) == ("candidate", "2")
    assert bundle.manifest.tasks == shipped.manifest.tasks
    assert shipped.digest in bundle.card
    for name, value in changed(shipped).items():
        assert np.array_equal(bundle.weights[name], value)


def test_its_graph_gives_its_known_answers_and_not_the_bases(exported, shipped: Bundle, run_shipped) -> None:
    bundle = read_bundle(exported[0])
    session_run = session_of(bundle.onnx)
    check_known_answer(session_run, bundle)
    for slices in (1, 7):
        outputs = session_run(one_series(np.zeros((slices, 96, 96), np.float32), 1))
        assert outputs["map_BSKhw"].shape == (1, slices, 9, 12, 12)
    assert not np.allclose(bundle.known_outputs["logits_BK"], shipped.known_outputs["logits_BK"], atol=1e-4)


def test_a_graph_tells_no_path_of_the_machine_that_made_it(exported) -> None:
    shipped = [read_bundle(path) for path in SHIPPED.parent.glob("*.bundle")]
    assert len(shipped) == 2
    for bundle in (read_bundle(exported[0]), *shipped):
        assert b".py" not in bundle.onnx
        assert b"stack_trace" not in bundle.onnx


def test_a_card_does_not_grow_with_each_release(exported, tmp_path: Path) -> None:
    base = read_bundle(exported[0])
    safetensors_numpy.save_file(base.weights, tmp_path / "w.safetensors")
    assert run_export(tmp_path / "w.safetensors", tmp_path / "again.bundle", exported[0]).returncode == 0
    assert abs(len(read_bundle(tmp_path / "again.bundle").card) - len(base.card)) < 40


def test_new_weights_drop_the_variants_of_the_old(tmp_path: Path, shipped: Bundle) -> None:
    variant = Variant(
        precision="fp16",
        form="by hand",
        made_from=shipped.manifest.members["model.onnx"],
        providers=("CUDAExecutionProvider",),
        tolerance=0.1,
        measured_on="nothing",
        examples=1,
        correct_before=1,
        correct_after=1,
        speed_by_threads={},
    )
    manifest = msgspec.structs.replace(shipped.manifest, variants=(variant,))
    base = (shipped.onnx, shipped.weights, shipped.known_inputs, shipped.known_outputs, shipped.card)
    write_bundle(tmp_path / "base.bundle", BundleParts(manifest, *base, {"fp16": b"stale"}))
    safetensors_numpy.save_file(changed(shipped), tmp_path / "w.safetensors")
    done = run_export(tmp_path / "w.safetensors", tmp_path / "new.bundle", tmp_path / "base.bundle")
    assert json.loads(done.stdout)["variants_dropped"] == ["fp16"]
    new = read_bundle(tmp_path / "new.bundle")
    assert (new.variants, new.manifest.variants) == ({}, ())


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda w: w.pop("head.bias"), "head.bias"),
        (lambda w: w.update(extra=np.zeros(1, np.float32)), "extra"),
        (lambda w: w.update({"head.bias": np.zeros(3, np.float32)}), "head.bias is float32"),
        (lambda w: w.update({"head.bias": np.full(9, np.nan, np.float32)}), "head.bias is not finite"),
        (lambda w: w.update({"head.bias": np.zeros(9, np.float64)}), "head.bias is float64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, shipped: Bundle, harm, reason: str) -> None:
    weights = dict(shipped.weights)
    harm(weights)
    safetensors_numpy.save_file(weights, tmp_path / "w.safetensors")
    refused = run_export(tmp_path / "w.safetensors", tmp_path / "new.bundle")
    assert refused.returncode == 1
    assert reason in json.loads(refused.stderr.splitlines()[-1])["error"]
    assert not (tmp_path / "new.bundle").exists()


def test_a_weights_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    refused = run_export(tmp_path / "w.safetensors", tmp_path / "new.bundle")
    assert refused.returncode == 1
    assert "cannot be read" in json.loads(refused.stderr.splitlines()[-1])["error"]


def test_a_graph_of_other_weights_fails_parity(shipped: Bundle) -> None:
    from models.export import parity
    from models.restore import load_weights, network_of

    network = network_of(shipped)
    assert parity(network, shipped.onnx, [shipped.known_inputs]) <= 1e-4
    load_weights(network, changed(shipped))
    with pytest.raises(BundleError, match="torch and ONNX Runtime differ"):
        parity(network, shipped.onnx, [shipped.known_inputs])
