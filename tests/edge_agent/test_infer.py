"""Reading: findings of phantoms, abstention, refusals, and which execution provider runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from edge_agent import findings as kept
from edge_agent import infer
from edge_agent.infer import NotForUsError, Reader, abstain_reason, judge
from edge_agent.providers import (
    CPU,
    CUDA,
    TENSORRT,
    GraphShapes,
    ProviderError,
    cache_key,
    chain,
    first_passing,
    gpu_identity,
    options,
    parted,
    runs,
)
from fleet_link.errors import SiteError
from models.adaptive import Calibration, bundled
from models.bundle import OUTPUT_NAMES, SHIPPED, Bundle, BundleParts, read_bundle, write_bundle
from models.errors import BundleError
from models.phantoms import LABELS, phantom
from models.preprocess import Prepared, Volume, prepare
from models.spec import Variant
from tests.edge_agent.report_support import open_reader

SHAPES = GraphShapes(batch=3, slices=12, smallest=96, largest=96)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return open_reader(tmp_path_factory.mktemp("engines"))


# --- what a reading says


@pytest.mark.parametrize("modality", ["XR", "CT", "MR"])
def test_findings_carry_one_probability_per_label_and_say_who_read(reader: Reader, modality: str) -> None:
    volume = phantom(modality, LABELS[modality][1], 5).volume
    found = reader.read(volume)
    task = reader.bundle.manifest.task_for(modality)
    assert task is not None
    assert [(label.name, label.code) for label in found.labels] == [(label.name, label.code) for label in task.labels]
    assert sum(label.probability for label in found.labels) == pytest.approx(1.0)
    assert found.predicted == max(found.labels, key=lambda label: label.probability).name
    assert (found.bundle_digest, found.bundle_name) == (reader.bundle.digest, reader.bundle.manifest.name)
    assert found.provider == CPU
    assert found.read_at > 0
    assert found.slice_weights_S.sum() == pytest.approx(1.0, abs=1e-3)
    assert len(found.map_SHW) == len(found.slice_weights_S) == len(found.source_index_S)
    assert 0.0 <= found.map_SHW.min() <= found.map_SHW.max() <= 1.0
    assert set(found.source_index_S) <= set(range(len(volume.voxels_ZYX)))


@pytest.mark.parametrize("modality", ["XR", "CT", "MR"])
def test_most_phantoms_never_trained_on_are_read_right(reader: Reader, modality: str) -> None:
    cases = [(label, seed) for label in LABELS[modality] for seed in range(900_000, 900_005)]
    right = sum(reader.read(phantom(modality, label, seed).volume).predicted == label for label, seed in cases)
    assert right >= 12, f"{right} of {len(cases)}"


def test_the_heat_lies_on_the_lesion(reader: Reader) -> None:
    made = phantom("XR", "nodule", 7)
    found = reader.read(made.volume)
    heat_YX = found.map_SHW[found.key_index_S]
    y, x = np.unravel_index(int(heat_YX.argmax()), heat_YX.shape)
    rows, columns = np.nonzero(made.lesion_ZYX[0])
    place = (y / heat_YX.shape[0], x / heat_YX.shape[1])
    lesion = (rows.mean() / made.lesion_ZYX.shape[1], columns.mean() / made.lesion_ZYX.shape[2])
    assert np.hypot(place[0] - lesion[0], place[1] - lesion[1]) < 0.15


def test_a_normal_image_shows_hardly_any_heat(reader: Reader) -> None:
    found = next(f for f in (reader.read(phantom("XR", "normal", s).volume) for s in range(20)) if f.probability > 0.9)
    assert found.predicted == "normal"
    assert found.map_label != "normal"
    assert found.map_SHW.max() < 0.1


# --- abstention and the map, by hand


def outputs(logits: list[float], maps_SKhw: np.ndarray, ood: float = 0.5) -> dict[str, np.ndarray]:
    weights_BS = np.full((1, len(maps_SKhw)), 1.0 / len(maps_SKhw), np.float32)
    logits_BK = np.array([[*logits, *[0.0] * 6]], np.float32)
    padded_SKhw = np.concatenate([maps_SKhw, np.zeros((len(maps_SKhw), 6, *maps_SKhw.shape[2:]))], axis=1)
    return {
        "logits_BK": logits_BK,
        "map_BSKhw": padded_SKhw[np.newaxis].astype(np.float32),
        "slice_weights_BS": weights_BS,
        "ood_B": np.array([ood], np.float32),
    }


def judged(reader: Reader, logits: list[float], maps_SKhw: np.ndarray | None = None, ood: float = 0.5) -> kept.Findings:
    manifest = reader.bundle.manifest
    task = manifest.task_for("XR")
    spec = manifest.input_for("XR")
    assert task is not None
    assert spec is not None
    task = msgspec.structs.replace(task, temperature=1.0, conformal_threshold=0.2)
    manifest = msgspec.structs.replace(manifest, ood_threshold=2.0)
    maps_SKhw = np.zeros((1, 3, 12, 12)) if maps_SKhw is None else maps_SKhw
    prepared = prepare(phantom("XR", "normal", 1).volume, spec)
    return judge(manifest, task, prepared, outputs(logits, maps_SKhw, ood), bundled(task))


def test_one_plausible_label_is_an_answer(reader: Reader) -> None:
    found = judged(reader, [0.0, 5.0, 0.0])
    assert (found.predicted, found.prediction_set, found.abstained, found.abstain_reason) == (
        "nodule",
        ("nodule",),
        False,
        "",
    )
    assert found.probability == pytest.approx(np.exp(5) / (np.exp(5) + 2), abs=1e-6)


def test_two_plausible_labels_abstain_and_name_both(reader: Reader) -> None:
    found = judged(reader, [1.0, 1.0, -9.0])
    assert found.prediction_set == ("normal", "nodule")
    assert found.abstained
    assert "normal, nodule" in found.abstain_reason


def test_a_strange_image_abstains_even_where_one_label_is_sure(reader: Reader) -> None:
    found = judged(reader, [0.0, 9.0, 0.0], ood=2.5)
    assert found.prediction_set == ("nodule",)
    assert found.abstained
    assert "2.5" in found.abstain_reason


def test_no_plausible_label_abstains() -> None:
    assert abstain_reason((), 0.0, 1.0) == "no label is plausible enough"
    assert abstain_reason(("nodule",), 1.0, 1.0) == ""


@pytest.mark.parametrize(("logit", "ood"), [(np.nan, 0.5), (np.inf, 0.5), (1.0, np.nan)])
def test_outputs_that_are_no_numbers_are_no_result(reader: Reader, logit: float, ood: float) -> None:
    with pytest.raises(SiteError, match="not finite"):
        judged(reader, [0.0, logit, 0.0], ood=ood)


def test_it_is_judged_by_the_calibration_it_is_given(reader: Reader) -> None:
    volume = phantom("XR", "nodule", 7).volume
    own, wide = reader.read(volume), reader.read(volume, lambda task: Calibration(4.0, 0.0, 9))
    assert own.calibration == bundled(reader.bundle.manifest.tasks[0])
    assert wide.calibration == Calibration(4.0, 0.0, 9)
    assert len(own.prediction_set) < len(wide.prediction_set) == 3
    assert wide.probability < own.probability


def test_the_map_is_evidence_against_the_other_labels_times_probability(reader: Reader) -> None:
    maps_SKhw = np.zeros((1, 3, 2, 2))
    maps_SKhw[0, :, 0, 0] = 5.0  # raises all logits alike: says nothing
    maps_SKhw[0, 1, 1, 1] = 2.0
    found = judged(reader, [0.0, 3.0, 0.0], maps_SKhw)
    heat_YX = found.map_SHW[0]
    assert found.map_label == "nodule"
    assert heat_YX[-1, -1] == pytest.approx(found.probability)
    assert heat_YX[0, 0] == 0.0


def test_the_map_leaves_out_the_padding_of_a_wide_image(reader: Reader) -> None:
    volume = phantom("XR", "nodule", 7).volume
    wide = replace(volume, voxels_ZYX=volume.voxels_ZYX[:, 64:192])
    found = reader.read(wide)
    assert found.map_SHW.shape[1] * 2 == found.map_SHW.shape[2]


def test_findings_survive_the_way_over_the_disk(reader: Reader, tmp_path: Path) -> None:
    found = reader.read(phantom("CT", "emphysema", 3).volume)
    kept.write_maps(found, tmp_path / "maps.npz")
    again = kept.restore(kept.to_json(found), tmp_path / "maps.npz")
    assert again.labels == found.labels
    assert again.key_index_S == found.key_index_S
    assert np.abs(again.map_SHW - found.map_SHW).max() < 1e-3
    assert np.array_equal(again.source_index_S, found.source_index_S)
    assert "map_SHW" not in json.loads(kept.to_json(found))
    assert (
        replace(
            again, map_SHW=found.map_SHW, slice_weights_S=found.slice_weights_S, source_index_S=found.source_index_S
        )
        == found
    )
    assert [path.name for path in tmp_path.iterdir()] == ["maps.npz"]


# --- refusals


def test_a_modality_without_a_task_is_not_for_us(reader: Reader) -> None:
    with pytest.raises(NotForUsError, match="reads no US"):
        reader.read(replace(phantom("XR", "normal", 1).volume, modality="US"))


def test_a_volume_with_nan_is_refused_as_the_sites_matter(reader: Reader) -> None:
    volume = phantom("XR", "normal", 1).volume
    with pytest.raises(SiteError, match="NaN"):
        reader.read(replace(volume, voxels_ZYX=np.full_like(volume.voxels_ZYX, np.nan)))


def test_a_flat_image_is_refused(reader: Reader) -> None:
    with pytest.raises(SiteError, match="no image"):
        reader.read(Volume(np.zeros((1, 64, 64), np.float32), (1.0, 1.0, 1.0), "XR"))


def test_a_file_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bundle").write_bytes(b"not a bundle")
    with pytest.raises(BundleError):
        Reader.open(tmp_path / "x.bundle", [CPU], 1, tmp_path)


# --- providers


def test_a_box_without_a_gpu_falls_to_the_cpu_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    reader = Reader.open(SHIPPED, [TENSORRT, CUDA, CPU], 1, tmp_path)
    if shutil.which("nvidia-smi") is None:
        assert reader.provider == CPU
        assert f"{TENSORRT} is not used: not in the installed ONNX Runtime" in caplog.text
        assert f"{CUDA} is not used" in caplog.text
    assert f"{reader.provider} passes the known-answer batch" in caplog.text


def test_only_an_absent_provider_is_refused_with_each_reason(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="NoSuchExecutionProvider: not in the installed") as refused:
        Reader.open(SHIPPED, ["NoSuchExecutionProvider"], 1, tmp_path)
    assert "CPUExecutionProvider" in refused.value.advice


def test_a_provider_that_computes_wrongly_is_refused(tmp_path: Path) -> None:
    bundle = read_bundle(SHIPPED)
    wrong = bundle.known_outputs | {"logits_BK": bundle.known_outputs["logits_BK"] + np.float32(3.0)}
    path = tmp_path / "wrong.bundle"
    write_bundle(
        path, BundleParts(bundle.manifest, bundle.onnx, bundle.weights, bundle.known_inputs, wrong, bundle.card)
    )
    with pytest.raises(BundleError, match="known-answer batch is wrong: logits_BK"):
        Reader.open(path, [CPU], 1, tmp_path)


def test_a_graph_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    bundle = read_bundle(SHIPPED)
    path = tmp_path / "graph.bundle"
    parts = BundleParts(
        bundle.manifest, b"no graph", bundle.weights, bundle.known_inputs, bundle.known_outputs, bundle.card
    )
    write_bundle(path, parts)
    with pytest.raises(BundleError, match="graph is not taken"):
        Reader.open(path, [CPU], 1, tmp_path)


def test_providers_are_tried_in_order_until_one_passes() -> None:
    tried = []

    def attempt(provider: str) -> str:
        tried.append(provider)
        if provider == TENSORRT:
            raise ProviderError("does not start")
        if provider == CUDA:
            raise BundleError("the known-answer batch is wrong")
        return "session"

    assert first_passing([TENSORRT, CUDA, CPU, "never asked"], attempt) == (CPU, "session")
    assert tried == [TENSORRT, CUDA, CPU]


def test_the_first_provider_that_passes_is_kept() -> None:
    assert first_passing([CUDA, CPU], lambda provider: provider) == (CUDA, CUDA)


def test_a_defect_of_ours_is_not_taken_for_a_missing_provider() -> None:
    def attempt(provider: str) -> str:
        raise KeyError(provider)

    with pytest.raises(KeyError):
        first_passing([CUDA, CPU], attempt)


# --- a provider that fails while it reads. There is no GPU here: fake session objects stand for the failing provider.


class FakeSessionOfAnExhaustedGpu:
    """Has passed its known answers; from then on every run says what CUDA says when its memory is full."""

    def run(self, names: object, inputs: object) -> list[object]:
        raise RuntimeError("CUDA failure 2: out of memory")


def failing_reader(tmp_path: Path, broken: dict[str, object], providers: tuple[str, ...]) -> tuple[Reader, list[str]]:
    """A Reader on real CPU sessions, but for the providers in `broken`; and which ones were tried, in order."""
    bundle = read_bundle(SHIPPED)
    tried: list[str] = []

    def attempt(provider: str) -> object:
        tried.append(provider)
        if isinstance(broken.get(provider), Exception):
            raise broken[provider]  # type: ignore[misc]
        return broken.get(provider) or infer._open_session(bundle, 1, tmp_path, CPU)

    return Reader(bundle, providers, attempt), tried


def test_a_fake_gpu_session_out_of_memory_hands_the_same_series_to_the_cpu(
    tmp_path: Path, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    gpus: dict[str, object] = {TENSORRT: FakeSessionOfAnExhaustedGpu(), CUDA: ProviderError("the driver is gone")}
    falling, tried = failing_reader(tmp_path, gpus, (TENSORRT, CUDA, CPU))
    assert (falling.provider, falling.trouble) == (TENSORRT, "")
    volume = phantom("XR", "nodule", 5).volume
    found = falling.read(volume)
    assert (found.provider, falling.provider) == (CPU, CPU)
    assert found.labels == reader.read(volume).labels
    falling.read(volume)
    assert tried == [TENSORRT, CUDA, CPU]  # each once: the next series stays on the CPU
    assert falling.trouble.startswith(f"{TENSORRT} failed while reading; {CPU} reads since")
    assert sum("failed while reading" in record.getMessage() for record in caplog.records) == 1


def test_a_fake_gpu_that_then_computes_wrongly_is_passed_over(tmp_path: Path) -> None:
    gpus: dict[str, object] = {TENSORRT: FakeSessionOfAnExhaustedGpu(), CUDA: BundleError("the known answer is wrong")}
    falling, _ = failing_reader(tmp_path, gpus, (TENSORRT, CUDA, CPU))
    assert falling.read(phantom("XR", "normal", 1).volume).provider == CPU


def test_a_fake_gpu_without_a_cpu_behind_it_fails_the_series_and_is_tried_anew_for_the_next(tmp_path: Path) -> None:
    broken: dict[str, object] = {CUDA: FakeSessionOfAnExhaustedGpu()}
    falling, tried = failing_reader(tmp_path, broken, (CUDA,))
    volume = phantom("XR", "normal", 1).volume
    with pytest.raises(SiteError, match="out of memory"):
        falling.read(volume)
    del broken[CUDA]  # whoever held the memory has gone
    assert falling.read(volume).provider == CUDA
    assert tried == [CUDA, CUDA]


def test_a_fake_gpu_with_nothing_sound_behind_it_fails_the_series_with_every_reason(tmp_path: Path) -> None:
    broken: dict[str, object] = {CUDA: FakeSessionOfAnExhaustedGpu(), CPU: BundleError("wrong answer")}
    falling, _ = failing_reader(tmp_path, broken, (CUDA, CPU))
    with pytest.raises(SiteError, match="wrong answer"):
        falling.read(phantom("XR", "normal", 1).volume)


def test_onnx_runtime_does_not_change_the_provider_in_silence(tmp_path: Path) -> None:
    session = infer._open_session(read_bundle(SHIPPED), 1, tmp_path, CPU)
    assert session._enable_fallback is False


def test_tensorrt_options_without_the_library(tmp_path: Path) -> None:
    """TensorRT itself does not run here: this checks what it would be given."""
    given = options(TENSORRT, cache_folder=tmp_path, shapes=SHAPES)
    assert given["trt_engine_cache_path"] == given["trt_timing_cache_path"] == str(tmp_path)
    assert given["trt_engine_cache_enable"] == given["trt_timing_cache_enable"] == "1"
    assert given["trt_profile_min_shapes"] == "slices_BSHW:1x1x96x96,slice_mask_BS:1x1,modality_B:1"
    assert given["trt_profile_opt_shapes"] == "slices_BSHW:1x12x96x96,slice_mask_BS:1x12,modality_B:1"
    assert given["trt_profile_max_shapes"] == "slices_BSHW:3x12x96x96,slice_mask_BS:3x12,modality_B:3"
    assert all(isinstance(value, str) for value in given.values())


def test_cuda_and_cpu_options_without_a_gpu(tmp_path: Path) -> None:
    assert options(CUDA, cache_folder=tmp_path, shapes=SHAPES)["use_tf32"] == "0"
    assert options(CPU, cache_folder=tmp_path, shapes=SHAPES) == {}


def test_tensorrt_leaves_what_it_cannot_run_to_cuda() -> None:
    assert chain(TENSORRT) == (TENSORRT, CUDA)
    assert chain(CUDA) == (CUDA,)
    assert chain(CPU) == (CPU,)


def test_an_engine_belongs_to_one_bundle_on_one_gpu_and_driver() -> None:
    key = cache_key("a" * 64, "H100|550.1|10.0")
    assert key == cache_key("a" * 64, "H100|550.1|10.0")
    assert len({key, cache_key("b" * 64, "H100|550.1|10.0"), cache_key("a" * 64, "H100|560.2|10.0")}) == 3
    assert "/" not in key
    assert " " not in key


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has an NVIDIA driver")
def test_no_driver_is_a_reason_not_a_crash() -> None:
    with pytest.raises(ProviderError, match="no NVIDIA driver"):
        gpu_identity()


def test_prepared_keeps_the_source_of_each_slice(reader: Reader) -> None:
    volume = phantom("CT", "nodule", 2).volume
    long = replace(volume, voxels_ZYX=np.concatenate([volume.voxels_ZYX] * 4))
    found = reader.read(long)
    spec = reader.bundle.manifest.input_for("CT")
    assert spec is not None
    prepared: Prepared = prepare(long, spec)
    assert np.array_equal(found.source_index_S, prepared.source_index_S)
    assert found.source_index_S.max() > 12


# --- variants


def variant(bundle: Bundle, precision: str, *providers: str, tolerance: float = 0.05) -> Variant:
    return Variant(
        precision=precision,
        form="by hand",
        made_from=bundle.manifest.members["model.onnx"],
        providers=providers,
        tolerance=tolerance,
        measured_on="nothing",
        examples=1,
        correct_before=1,
        correct_after=1,
        speed_by_threads={},
    )


def with_int8(path: Path, graph: bytes | None = None) -> Path:
    """The shipped bundle with an int8 graph for the CPU: the fp32 one under another name unless one is given."""
    bundle = read_bundle(SHIPPED)
    manifest = msgspec.structs.replace(bundle.manifest, variants=(variant(bundle, "int8", CPU),))
    write_bundle(
        path,
        BundleParts(
            manifest,
            bundle.onnx,
            bundle.weights,
            bundle.known_inputs,
            bundle.known_outputs,
            bundle.card,
            {"int8": graph or bundle.onnx},
        ),
    )
    return path


def harmed(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_from_string(read_bundle(SHIPPED).onnx)
    change(model)
    return model.SerializeToString()


def scale_head(factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        head = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
        head.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(head) * np.float32(factor), head.name))

    return change


def drop_last_label(model: onnx.ModelProto) -> None:
    """logits_BK without its last column."""
    for node in model.graph.node:
        node.output[:] = ["all_logits" if name == OUTPUT_NAMES[0] else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(8), "kept"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["all_logits", "kept"], [OUTPUT_NAMES[0]], axis=1))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8


def test_runs_are_the_providers_with_their_variants_first() -> None:
    bundle = read_bundle(SHIPPED)
    variants = [variant(bundle, "int8", CPU), variant(bundle, "fp16", CUDA, TENSORRT)]
    expected = (f"{TENSORRT} fp16", TENSORRT, f"{CUDA} fp16", CUDA, f"{CPU} int8", CPU)
    assert runs([TENSORRT, CUDA, CPU], variants) == expected
    assert runs([CUDA, CPU], ()) == (CUDA, CPU)
    assert (parted(f"{CPU} int8"), parted(CUDA)) == ((CPU, "int8"), (CUDA, "fp32"))


def test_tensorrt_computes_in_half_precision_for_that_variant_only(tmp_path: Path) -> None:
    assert options(TENSORRT, precision="fp16", cache_folder=tmp_path, shapes=SHAPES)["trt_fp16_enable"] == "1"
    assert options(TENSORRT, cache_folder=tmp_path, shapes=SHAPES)["trt_fp16_enable"] == "0"


def test_a_variant_for_the_cpu_reads_and_the_findings_say_so(tmp_path: Path) -> None:
    path = with_int8(tmp_path / "int8.bundle")
    reader = Reader.open(path, [CPU], 1, tmp_path)
    found = reader.read(phantom("XR", "nodule", 7).volume)
    assert reader.provider == found.provider == f"{CPU} int8"
    assert Reader.open(path, [CPU], 1, tmp_path, "fp32").provider == CPU


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scale_head(2.0), "known-answer batch is wrong"),
        (scale_head(float("nan")), "known-answer batch is wrong"),
        (drop_last_label, "gives no logits_BK of shape"),
    ],
)
def test_a_variant_that_computes_wrongly_leaves_its_provider_to_fp32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[onnx.ModelProto], None], reason: str
) -> None:
    caplog.set_level("INFO")
    reader = Reader.open(with_int8(tmp_path / "int8.bundle", harmed(change)), [CPU], 1, tmp_path)
    assert reader.provider == CPU
    assert f"{CPU} int8 is not used: " in caplog.text
    assert reason in caplog.text


def test_a_variant_that_is_no_graph_leaves_its_provider_to_fp32(tmp_path: Path) -> None:
    assert Reader.open(with_int8(tmp_path / "int8.bundle", b"no graph"), [CPU], 1, tmp_path).provider == CPU


def test_a_variant_whose_outputs_are_not_finite_leaves_the_series_to_fp32(tmp_path: Path) -> None:
    bundle = read_bundle(SHIPPED)
    right = bundle.known_outputs
    opened = []

    class Overflowing:
        """Half precision on an image it cannot hold."""

        def run(self, names: object, inputs: object) -> list[np.ndarray]:
            return [np.full_like(right[name], np.inf) for name in OUTPUT_NAMES]

        def get_outputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name=name) for name in OUTPUT_NAMES]

    def attempt(run: str) -> Any:
        opened.append(run)
        return Overflowing() if run == f"{CPU} int8" else infer._open_session(bundle, 1, tmp_path, run)

    reader = Reader(bundle, [f"{CPU} int8", CPU], attempt)
    assert reader.read(phantom("XR", "nodule", 7).volume).provider == CPU
    assert opened == [f"{CPU} int8", CPU]
    assert "int8 failed while reading" in reader.trouble
