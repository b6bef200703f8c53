"""Variants: made the same each time, measured, shipped only where they pay."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from models.bundle import SHIPPED, Bundle, BundleParts, check_known_answer, read_bundle, write_bundle
from models.errors import BundleError, VolumeError
from models.latency import medians_s
from models.quantise import (
    FASTER,
    Material,
    Measured,
    best,
    folder_material,
    phantom_material,
    quantise,
    read_all,
    session_run,
    speed_ratios,
    why_left_out,
)
from models.variants import FORMS, to_fp16, to_int8
from tests.models.conftest import session_of

GOOD = Measured(
    precision="int8",
    form="by hand",
    examples=400,
    correct_before=390,
    correct_after=388,
    strange_changed=2,
    known_answer_difference=0.1,
    speed_by_threads={1: 1.4, 2: 1.31},
    left_out="",
)
QDQ, QDQ_WITH_OOD, _, DYNAMIC = FORMS


@pytest.fixture(scope="module")
def material(shipped: Bundle) -> Material:
    return phantom_material(shipped.manifest, 3)


@pytest.fixture(scope="module")
def graphs(shipped: Bundle) -> dict[str, bytes]:
    """The shipped graph in each form, calibrated on the known inputs."""
    made = {form.name: to_int8(shipped.onnx, form, [shipped.known_inputs]) for form in FORMS}
    return made | {"fp16": to_fp16(shipped.onnx)}


# --- what ships


def test_half_a_point_lost_and_three_tenths_faster_is_fit_to_ship() -> None:
    assert why_left_out(GOOD) == ""
    assert why_left_out(replace(GOOD, correct_after=395)) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"correct_after": 387}, "loses 3 of 400"),
        ({"strange_changed": 3}, "takes 3 examples or negatives"),
        ({"speed_by_threads": {1: 1.4, 2: FASTER - 0.01}}, "not 1.3 times as fast"),
        ({"known_answer_difference": None}, "known answers are missing"),
    ],
)
def test_what_does_not_pay_is_left_out_and_why(change: dict, reason: str) -> None:
    assert reason in why_left_out(replace(GOOD, **change))


def test_fp16_is_for_a_gpu_and_not_judged_by_the_cpu_s_speed() -> None:
    assert why_left_out(replace(GOOD, precision="fp16", speed_by_threads={})) == ""


def test_the_fastest_fit_form_ships() -> None:
    slow = replace(GOOD, left_out="it is not 1.3 times as fast as fp32", speed_by_threads={1: 1.1, 2: 1.0})
    slower = replace(slow, speed_by_threads={1: 9.0, 2: 0.9})
    faster = replace(GOOD, speed_by_threads={1: 1.5, 2: 1.5})
    useless = replace(slow, known_answer_difference=None, speed_by_threads={1: 9.0, 2: 9.0})
    made = [(slow, b"slow"), (slower, b"slower"), (GOOD, b"good"), (faster, b"faster"), (useless, b"useless")]
    assert best(made, "int8", force=False) == (faster, b"faster")
    assert best([*made[:2], made[4]], "int8", force=False) is None
    assert best([*made[:2], made[4]], "int8", force=True) == (slow, b"slow")
    assert best([made[4]], "int8", force=True) is None
    assert best(made, "fp16", force=True) is None


# --- what is made


@pytest.mark.slow
def test_the_same_graph_and_calibration_give_the_same_bytes(shipped: Bundle, graphs: dict[str, bytes]) -> None:
    for form in (QDQ, DYNAMIC):
        assert to_int8(shipped.onnx, form, [shipped.known_inputs]) == graphs[form.name]
    assert to_fp16(shipped.onnx) == graphs["fp16"]


def _matmul_graph(*widths: int) -> bytes:
    """One MatMul after another, without names, for which ONNX has no need."""
    weights, nodes = [], []
    for number, (rows, columns) in enumerate(itertools.pairwise(widths)):
        weights.append(onnx.numpy_helper.from_array(np.full((rows, columns), 0.5, np.float32), f"weight{number}"))
        nodes.append(onnx.helper.make_node("MatMul", [f"x{number}", f"weight{number}"], [f"x{number + 1}"]))
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", width])
        for name, width in (("x0", widths[0]), (f"x{len(nodes)}", widths[-1]))
    ]
    graph = onnx.helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()


def test_a_graph_with_nothing_for_a_form_is_refused_and_not_quantised_whole() -> None:
    with pytest.raises(BundleError, match="nothing in the graph can be quantised") as refusal:
        to_int8(_matmul_graph(4, 4), DYNAMIC, [])
    assert refusal.value.advice


def test_of_nodes_without_names_only_the_wide_one_is_quantised() -> None:
    model = onnx.load_from_string(to_int8(_matmul_graph(32, 32, 4), DYNAMIC, []))
    made = [node.op_type for node in model.graph.node if "MatMul" in node.op_type]
    assert made == ["MatMulInteger", "MatMul"]


@pytest.mark.slow
def test_every_form_says_nearly_what_fp32_says(shipped: Bundle, graphs: dict[str, bytes]) -> None:
    for graph in graphs.values():
        outputs = session_of(graph)(shipped.known_inputs)
        for name in ("logits_BK", "map_BSKhw", "slice_weights_BS"):
            assert np.abs(outputs[name] - shipped.known_outputs[name]).max() < 0.3
        assert len(graph) < 0.7 * len(shipped.onnx)


@pytest.mark.slow
def test_stem_head_gate_and_the_rest_stay_in_float32(graphs: dict[str, bytes]) -> None:
    model = onnx.load_from_string(graphs[QDQ_WITH_OOD.name])
    whole = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    small = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    assert {"stem.conv.weight", "gate.weight", "head.weight"} <= whole
    assert any(name.startswith("fine.") for name in small)


@pytest.mark.slow
def test_the_distribution_score_is_quantised_only_where_the_form_says_so(graphs: dict[str, bytes]) -> None:
    def quantised(form: str) -> bool:
        model = onnx.load_from_string(graphs[form])
        kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        return any(name.startswith("ood_stages.") and kind == onnx.TensorProto.INT8 for name, kind in kinds.items())

    assert not quantised(QDQ.name)
    assert quantised(QDQ_WITH_OOD.name)


# --- what is measured


def test_reading_counts_what_is_right_and_what_is_strange(shipped: Bundle, material: Material) -> None:
    reading = read_all(shipped.manifest, session_run(shipped.onnx, 1), material.measuring)
    assert len(reading.is_strange_M) == 2 * len(material.measuring) == 54
    assert reading.correct >= 25
    assert 0 < reading.is_strange_M.sum() < 54


def test_a_graph_that_says_nan_is_wrong_and_all_strange(shipped: Bundle, material: Material) -> None:
    nothing = {name: np.full_like(array, np.nan) for name, array in shipped.known_outputs.items()}

    def run(inputs: dict) -> dict:
        batch = len(inputs["modality_B"])
        return {name: np.repeat(array[:1], batch, axis=0) for name, array in nothing.items()}

    assert read_all(shipped.manifest, run, material.measuring).is_strange_M.all()


@pytest.mark.slow
def test_speed_is_given_for_one_thread_and_for_two(shipped: Bundle, material: Material) -> None:
    ratios = speed_ratios(shipped.onnx, shipped.onnx, material.measuring)
    assert set(ratios) == {1, 2}
    assert all(ratio > 0 for ratio in ratios.values())


def test_ways_are_measured_in_turns() -> None:
    order: list[str] = []
    medians_s({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 5


def test_calibration_and_measuring_never_share_an_image(material: Material) -> None:
    seen = {example.slices_SHW.tobytes() for example in material.calibration}
    assert not seen & {example.slices_SHW.tobytes() for example in material.measuring}


# --- the whole


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, shipped: Bundle, material: Material) -> tuple[Bundle, dict]:
    out = tmp_path_factory.mktemp("quantise") / "out.bundle"
    report = quantise(shipped, material, ["int8", "fp16"], out, force=True)
    return read_bundle(out), report


@pytest.mark.slow
def test_the_bundle_carries_both_and_what_was_measured(quantised: tuple[Bundle, dict], shipped: Bundle) -> None:
    bundle, report = quantised
    assert set(bundle.variants) == set(report["shipped"]) == {"int8", "fp16"}
    assert (report["digest"], report["base"]) == (bundle.digest, shipped.digest)
    assert (bundle.onnx, bundle.weights_bytes, bundle.card) == (shipped.onnx, shipped.weights_bytes, shipped.card)
    assert len(report["measured"]) == len(FORMS) + 1
    for variant in bundle.manifest.variants:
        check_known_answer(session_of(bundle.graph(variant.precision)), bundle, variant.precision)
        assert variant.examples == 27
        assert "27 phantoms" in variant.measured_on
        assert variant.correct_after >= variant.correct_before - 1
    int8, fp16 = (bundle.manifest.variant_for(precision) for precision in ("int8", "fp16"))
    assert (int8.providers, set(int8.speed_by_threads)) == (("CPUExecutionProvider",), {1, 2})
    assert "CPUExecutionProvider" not in fp16.providers


@pytest.mark.slow
def test_variants_made_from_a_quantised_bundle_replace_the_old(
    quantised: tuple[Bundle, dict], material: Material, tmp_path: Path
) -> None:
    quantise(quantised[0], material, ["fp16"], tmp_path / "again.bundle", force=False)
    assert set(read_bundle(tmp_path / "again.bundle").variants) == {"fp16"}


@pytest.mark.slow
def test_a_tolerance_does_not_let_other_weights_pass(quantised: tuple[Bundle, dict]) -> None:
    bundle = quantised[0]
    model = onnx.load_from_string(bundle.graph("int8"))
    head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    head.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(head), head.name))
    with pytest.raises(BundleError, match="known-answer batch is wrong"):
        check_known_answer(session_of(model.SerializeToString()), bundle, "int8")


# --- what cannot be


def test_labels_that_no_phantom_shows_are_refused(shipped: Bundle) -> None:
    task = shipped.manifest.tasks[0]
    other = msgspec.structs.replace(task.labels[1], name="fracture")
    strange = msgspec.structs.replace(task, labels=(task.labels[0], other, task.labels[2]))
    manifest = msgspec.structs.replace(shipped.manifest, tasks=(strange, *shipped.manifest.tasks[1:]))
    with pytest.raises(BundleError, match="no XR phantom shows fracture"):
        phantom_material(manifest, 1)


def test_examples_of_one_split_alone_are_refused(tmp_path: Path, shipped: Bundle, material: Material) -> None:
    np.savez(tmp_path / "a.npz", slices_SHW=material.measuring[0].slices_SHW)
    row = {"path": "a.npz", "modality": "XR", "label": "normal", "split": "train"}
    (tmp_path / "examples.json").write_text(json.dumps([row]))
    with pytest.raises(VolumeError, match="both splits"):
        folder_material(shipped.manifest, tmp_path)
    (tmp_path / "examples.json").write_text(json.dumps([row, row | {"split": "heldout"}]))
    assert len(folder_material(shipped.manifest, tmp_path).measuring) == 1


def test_a_graph_that_is_none_is_refused() -> None:
    with pytest.raises(BundleError, match="not taken"):
        session_run(b"nothing", 1)


def run_quantise(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "models.quantise", *arguments], capture_output=True, text=True, timeout=240
    )


def test_a_missing_bundle_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run_quantise("--bundle", str(tmp_path / "none"), "--phantoms", "1", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "cannot be read" in json.loads(done.stderr)["error"]


def test_a_bundle_whose_graph_is_none_is_refused_in_one_line(tmp_path: Path, shipped: Bundle) -> None:
    broken = tmp_path / "broken.bundle"
    parts = (b"no graph", shipped.weights, shipped.known_inputs, shipped.known_outputs, shipped.card)
    write_bundle(broken, BundleParts(shipped.manifest, *parts))
    done = run_quantise("--bundle", str(broken), "--phantoms", "1", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "graph is not taken" in json.loads(done.stderr)["error"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_prints_its_report(tmp_path: Path) -> None:
    out = tmp_path / "out.bundle"
    done = run_quantise("--bundle", str(SHIPPED), "--phantoms", "1", "--out", str(out), "--precision", "fp16")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["shipped"] == {"fp16": "all but the distribution score"}
    assert set(read_bundle(out).variants) == {"fp16"}
