"""Networks from elsewhere become bundles: the graph says what the network says, and what is not known is said."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="importing needs the extra `train`")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edge_agent.infer import Reader  # noqa: E402
from models import importing, onnx_file  # noqa: E402
from models.bundle import check_known_answer, read_bundle  # noqa: E402
from models.calibration import softmax  # noqa: E402
from models.errors import BundleError, ModelError, SpecError  # noqa: E402
from models.import_spec import EXAMPLE, read_spec  # noqa: E402
from models.importing import Order, import_network  # noqa: E402
from models.phantoms import phantom  # noqa: E402
from models.preprocess import Volume, prepare  # noqa: E402
from tests.models.conftest import session_of  # noqa: E402
from tests.models.import_support import EXPLAINED, PLAIN, SIZE, UNDECIDED, Net, build, save, write_spec  # noqa: E402

CPU = ["CPUExecutionProvider"]


def imported(tmp_path: Path, net: Net = PLAIN, images: Path | None = None, **spec: object) -> importing.Report:
    path = save(tmp_path / "m.onnx", build(net))
    order = Order(write_spec(tmp_path / "s.toml", **spec), tmp_path / "out.bundle", onnx=path, images=images)
    return import_network(order)


def refused(tmp_path: Path, model: object, **spec: object) -> ModelError:
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError) as caught:
        import_network(Order(write_spec(tmp_path / "s.toml", **spec), tmp_path / "out.bundle", tmp_path / "m.onnx"))
    assert caught.value.advice
    assert not (tmp_path / "out.bundle").exists()
    return caught.value


def by_hand(net: Net, slices_SHW: np.ndarray, low: float, high: float, mean: object, std: object) -> np.ndarray:
    """The network's logits of each slice, computed in numpy alone."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in build(net).graph.initializer}
    channels = net.channels or 1
    mean_C, std_C = np.broadcast_to(mean, channels), np.broadcast_to(std, channels)
    rows = []
    for slice_HW in slices_SHW.astype(np.float64):
        image_CHW = ((slice_HW + 1) / 2 * (high - low) + low - mean_C[:, None, None]) / std_C[:, None, None]
        windows = np.lib.stride_tricks.sliding_window_view(image_CHW, (3, 3), axis=(1, 2))[:, ::4, ::4]
        features = np.maximum(np.einsum("chwij,dcij->dhw", windows, weights["conv.weight"]), 0)
        linear_KD = weights["linear.weight"].T if net.transposed else weights["linear.weight"]
        rows.append(linear_KD @ features.mean((1, 2)) + weights["linear.bias"])
    return np.array(rows)


@pytest.mark.parametrize(
    ("net", "mean", "std"),
    [
        (Net(), "[10.0]", "[50.0]"),
        (Net(channels=None), "[10.0]", "[50.0]"),
        (Net(channels=3), "[10.0, 20.0, 30.0]", "[50.0, 60.0, 70.0]"),
        (Net(channels=3, opset=13), "[10.0]", "[50.0]"),
        (Net(softmax=True), "[10.0]", "[50.0]"),
        (Net(side="side"), "[10.0]", "[50.0]"),
    ],
)
def test_the_bundle_says_what_the_network_says(tmp_path: Path, net: Net, mean: str, std: str) -> None:
    kind = "probabilities" if net.softmax else "logits"
    report = imported(tmp_path, net, mean=mean, std=std, kind=kind)
    assert report.parity <= 1e-4
    session_run = session_of(read_bundle(tmp_path / "out.bundle").onnx)
    slices_BSHW = np.random.default_rng(5).uniform(-1, 1, (2, 3, SIZE, SIZE)).astype(np.float32)
    mask_BS = np.array([[True, True, True], [True, True, False]])
    outputs = session_run({"slices_BSHW": slices_BSHW, "slice_mask_BS": mask_BS, "modality_B": np.zeros(2, np.int64)})
    for b, real in enumerate((3, 2)):
        rows_SK = by_hand(net, slices_BSHW[b, :real], 0.0, 255.0, json.loads(mean), json.loads(std))
        if net.softmax:
            rows_SK = np.log(np.clip(softmax(rows_SK), 1e-7, 1))
        assert outputs["logits_BK"][b] == pytest.approx(rows_SK.mean(0), rel=1e-3, abs=1e-3)
        assert outputs["slice_weights_BS"][b] == pytest.approx([1 / real] * real + [0] * (3 - real))
    assert outputs["map_BSKhw"].shape == (2, 3, 3, 1, 1)
    assert not outputs["map_BSKhw"].any()
    assert not outputs["ood_B"].any()


def test_the_bundle_is_whole_and_imported_again_the_same(tmp_path: Path) -> None:
    report = imported(tmp_path)
    bundle = read_bundle(tmp_path / "out.bundle")
    assert bundle.digest == report.digest == imported(tmp_path).digest
    check_known_answer(session_of(bundle.onnx), bundle)
    manifest = bundle.manifest
    assert (manifest.network, manifest.is_trainable, bundle.weights) == ("imported", False, {})
    assert [label.code.value for label in manifest.tasks[0].labels] == ["17621005", "233604007", "RID50149"]
    assert manifest.parameters == 4 * 9 + 12 + 3 == report.parameters
    for loud in ("NOT CALIBRATED", "NO EXPLANATION", "NO STRANGENESS SCORE", "NO DRIFT WATCH", "NOT TRAINABLE"):
        assert loud in bundle.card
        assert any(warning.startswith(loud) for warning in report.warnings)


@pytest.mark.parametrize("modality", ["XR", "CT", "MR"])
def test_the_box_reads_with_it_and_abstains_as_long_as_it_is_not_calibrated(tmp_path: Path, modality: str) -> None:
    imported(tmp_path, modality=modality)
    reader = Reader.open(tmp_path / "out.bundle", CPU, 1, tmp_path)
    findings = reader.read(phantom(modality, "normal", 1).volume)
    assert findings.abstained
    assert findings.prediction_set == ("normal", "pneumonia", "nodule")
    assert findings.ood == 0.0
    assert not findings.map_SHW.any()


@pytest.mark.parametrize("net", [Net(), Net(transposed=True), Net(labels=3, softmax=True)])
def test_the_map_is_the_decision(tmp_path: Path, net: Net) -> None:
    kind = "probabilities" if net.softmax else "logits"
    report = imported(tmp_path, net, explanation=EXPLAINED, kind=kind)
    assert report.explanation
    bundle = read_bundle(tmp_path / "out.bundle")
    inputs = bundle.known_inputs
    outputs = session_of(bundle.onnx)(inputs)
    assert outputs["map_BSKhw"].shape[2:] == (3, 8, 8)
    bias_K = np.array([-0.5, 0, 0.5])
    summed_BK = outputs["map_BSKhw"].sum((1, 3, 4)) + bias_K
    of_task_BK = outputs["logits_BK"] - outputs["logits_BK"].mean(1, keepdims=True)
    assert summed_BK - summed_BK.mean(1, keepdims=True) == pytest.approx(of_task_BK, rel=1e-3, abs=1e-3)
    assert "NO EXPLANATION" not in bundle.card


# --- calibration


def noisy_images(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Noise of many strengths, and the spec's labels."""
    images = np.random.default_rng(seed).uniform(0, 1, (count, 40, 40)).astype(np.float32)
    images *= np.random.default_rng(seed + 1).uniform(0, 1, (count, 1, 40)).astype(np.float32)
    names = ["normal", "pneumonia", "nodule"]
    return images, names


def labels_of(tmp_path: Path, images: np.ndarray) -> np.ndarray:
    """What the network says of them."""
    imported(tmp_path, UNDECIDED, mean="[60.0]")
    bundle = read_bundle(tmp_path / "out.bundle")
    session_run, spec = session_of(bundle.onnx), bundle.manifest.inputs[0]
    volumes = [Volume(image[None], (1.0, 1.0, 1.0), "XR") for image in images]
    slices_BSHW = np.stack([prepare(volume, spec).slices_SHW for volume in volumes])
    count = len(images)
    inputs = {
        "slices_BSHW": slices_BSHW,
        "slice_mask_BS": np.ones((count, 1), bool),
        "modality_B": np.zeros(count, int),
    }
    return session_run(inputs)["logits_BK"].argmax(1)


def test_labelled_images_calibrate_and_measure(tmp_path: Path) -> None:
    images, names = noisy_images(120, 0)
    truth_N = labels_of(tmp_path, images)
    number_N = np.arange(120)
    given_N = np.where(number_N % 10 == 0, truth_N + 1 + number_N // 10 % 2, truth_N) % 3  # one in ten is wrong
    backwards = names[::-1]  # the file's order of names is not the spec's
    np.savez(
        tmp_path / "i.npz",
        images=images,
        labels=[backwards.index(names[label]) for label in given_N],
        class_names=backwards,
    )
    report = imported(tmp_path, UNDECIDED, tmp_path / "i.npz", explanation=EXPLAINED, mean="[60.0]")
    assert report.images == 120
    assert report.accuracy == pytest.approx(0.9)
    assert 0 < report.conformal_threshold <= 0.5
    assert report.temperature != 1.0
    bundle = read_bundle(tmp_path / "out.bundle")
    assert bundle.manifest.tasks[0].temperature == report.temperature
    assert bundle.manifest.tasks[0].reference is not None
    assert bundle.manifest.tasks[0].reference.cases == 60
    assert bundle.manifest.ood_threshold == report.ood_threshold
    assert "accuracy 0.900" in bundle.card
    assert [warning.split(":")[0] for warning in report.warnings] == ["NOT TRAINABLE"]


def test_with_images_and_features_a_stranger_is_known_as_one(tmp_path: Path) -> None:
    images, _ = noisy_images(80, 0)
    np.savez(tmp_path / "i.npz", images=images)
    report = imported(tmp_path, images=tmp_path / "i.npz", explanation=EXPLAINED)
    assert report.accuracy is None
    assert any(warning.startswith("NOT CALIBRATED") for warning in report.warnings)
    reader = Reader.open(tmp_path / "out.bundle", CPU, 1, tmp_path)
    fresh, _ = noisy_images(20, 50)
    own = [reader.read(Volume(image[None], (1.0, 1.0, 1.0), "XR")).ood for image in fresh]
    dot = np.pad(np.ones((4, 4), np.float32), 18)
    stranger = reader.read(Volume(dot[None], (1.0, 1.0, 1.0), "XR"))
    assert report.ood_threshold is not None
    assert np.mean(np.array(own) <= report.ood_threshold) >= 0.9
    assert stranger.ood > report.ood_threshold
    assert "unlike the training images" in stranger.abstain_reason


def test_too_few_images_leave_it_abstaining_and_say_so(tmp_path: Path) -> None:
    images, names = noisy_images(8, 0)
    np.savez(tmp_path / "i.npz", images=images, labels=(names * 3)[:8])
    report = imported(tmp_path, images=tmp_path / "i.npz")
    assert report.conformal_threshold == 0.0
    assert any(warning.startswith("TOO FEW IMAGES") for warning in report.warnings)


def test_a_network_that_guesses_is_called_that(tmp_path: Path) -> None:
    images, names = noisy_images(60, 0)
    np.savez(tmp_path / "i.npz", images=images, labels=[names[n % 3] for n in range(60)])
    report = imported(tmp_path, images=tmp_path / "i.npz")
    assert any(warning.startswith("LITTLE BETTER THAN GUESSING") for warning in report.warnings)


def test_a_folder_for_each_label(tmp_path: Path) -> None:
    import cv2

    images, names = noisy_images(24, 0)
    for n, image in enumerate(images):
        folder = tmp_path / "images" / names[n % 3]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{n}.png"), (image * 65535).astype(np.uint16))
    report = imported(tmp_path, images=tmp_path / "images")
    assert report.images == 24
    assert report.accuracy is not None


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"pictures": np.zeros((2, 40, 40))}, "no .npz with images"),
        ({"images": np.zeros((2, 40, 40, 3))}, "N × H × W"),
        ({"images": np.eye(40)[None].repeat(2, 0), "labels": [0, 1]}, "class_names"),
        ({"images": np.eye(40)[None].repeat(2, 0), "labels": ["normal", "cyst"]}, "cyst is no label"),
        ({"images": np.eye(40)[None].repeat(2, 0), "labels": ["normal"]}, "labels for 2 images"),
        ({"images": np.eye(40)[None].repeat(2, 0), "labels": ["normal"] * 2}, "no image is labelled pneumonia"),
        ({"images": np.zeros((2, 40, 40))}, "same value"),
        ({"images": np.full((1, 40, 40), np.nan)}, "NaN"),
        ({"images": np.array([[[None]]], dtype=object)}, "no .npz with images"),
    ],
)
def test_images_that_are_none_are_refused(tmp_path: Path, arrays: dict, reason: str) -> None:
    np.savez(tmp_path / "i.npz", **arrays)
    with pytest.raises(SpecError, match=reason):
        imported(tmp_path, images=tmp_path / "i.npz")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images" / "cyst").mkdir(parents=True)
    with pytest.raises(SpecError, match="cyst is no label"):
        imported(tmp_path, images=tmp_path / "images")
    (tmp_path / "images" / "cyst").rename(tmp_path / "images" / "normal")
    with pytest.raises(SpecError, match="holds no images"):
        imported(tmp_path, images=tmp_path / "images")
    (tmp_path / "images" / "normal" / "a.png").write_bytes(b"no")
    with pytest.raises(SpecError, match=r"a\.png is no image"):
        imported(tmp_path, images=tmp_path / "images")
    with pytest.raises(SpecError, match="cannot be read"):
        imported(tmp_path, images=tmp_path / "gone")


# --- refusals


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Net(batch=1), "batch of the input image is fixed at 1"),
        (Net(channels=2), "2 channels"),
        (Net(labels=2), "2 scores, the spec has 3 labels"),
        (Net(side=64), "64 x 64 pixels"),
        (Net(softmax=True), "not logits"),
        (Net(factor=float("nan")), "NaN"),
        (Net(opset=12, channels=1), "opset 12"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(tmp_path: Path, net: Net, reason: str) -> None:
    assert reason in str(refused(tmp_path, build(net)))


def test_logits_that_are_called_probabilities_are_refused(tmp_path: Path) -> None:
    assert "not probabilities" in str(refused(tmp_path, build(), kind="probabilities"))


def test_an_open_size_must_be_said(tmp_path: Path) -> None:
    assert "any size" in str(refused(tmp_path, build(Net(side="side")), size=""))


def test_half_precision_is_refused(tmp_path: Path) -> None:
    model = build()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.node[0].input[:]
    model.graph.node[0].CopyFrom(helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT))
    assert "not float32" in str(refused(tmp_path, model))


def test_a_volume_reader_and_two_inputs_are_refused(tmp_path: Path) -> None:
    model = build()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 32, 32, 32]))
    assert "5 axes" in str(refused(tmp_path, model))
    model = build()
    model.graph.input.append(helper.make_tensor_value_info("age", TensorProto.FLOAT, ["N"]))
    assert "2 inputs" in str(refused(tmp_path, model))


def test_a_segmentation_is_refused(tmp_path: Path) -> None:
    model = build()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 4, 8, 8]))
    assert "only classifiers" in refused(tmp_path, model).advice


def test_which_of_two_outputs_must_be_said(tmp_path: Path) -> None:
    model = build()
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["N", 4]))
    assert "the graph gives scores, flat" in str(refused(tmp_path, model))
    spec = write_spec(tmp_path / "s.toml", tensor='tensor = "scores"')
    import_network(Order(spec, tmp_path / "out.bundle", tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("net", "explanation", "reason", "advice"),
    [
        (Net(), EXPLAINED.replace('"features"', '"nowhere"'), "no tensor nowhere", "features, c"),
        (Net(), EXPLAINED.replace("linear.weight", "w"), "no initializer w", "linear.weight"),
        (Net(), EXPLAINED.replace('"features"', '"flat"'), "no feature map", "features, c"),
        (Net(), EXPLAINED.replace('"features"', '"c"'), "not what the network decides by", "after its activation"),
        (Net(pool="GlobalMaxPool"), EXPLAINED, "not what the network decides by", "leave"),
    ],
)
def test_a_map_that_would_lie_is_refused(tmp_path: Path, net: Net, explanation: str, reason: str, advice: str) -> None:
    error = refused(tmp_path, build(net), explanation=explanation)
    assert reason in str(error)
    assert advice in error.advice


def test_a_network_that_looks_at_its_batch_as_a_whole_is_refused(tmp_path: Path) -> None:
    model = build()
    nodes = list(model.graph.node)
    shift = [
        helper.make_node("ReduceMean", ["image", "zero"], ["batch_mean"]),
        helper.make_node("Sub", ["image", "batch_mean"], ["x"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend([*shift, *nodes[1:]])
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero"))
    assert "differ by" in str(refused(tmp_path, model))


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "s.toml")
    for content in (b"", b"not onnx", b"\x08\x0a" * 40):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(SpecError):
            import_network(Order(spec, tmp_path / "out.bundle", tmp_path / "m.onnx"))
    with pytest.raises(SpecError, match="cannot be read"):
        import_network(Order(spec, tmp_path / "out.bundle", tmp_path / "gone.onnx"))


def test_a_file_too_big_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_GRAPH_BYTES", 100)
    assert "larger than 100 bytes" in str(refused(tmp_path, build()))


def test_external_tensors_are_read_from_beside_the_file_and_nowhere_else(tmp_path: Path) -> None:
    imported(tmp_path)
    plain = read_bundle(tmp_path / "out.bundle").known_outputs["logits_BK"]
    onnx.save(build(), tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    order = Order(tmp_path / "s.toml", tmp_path / "out.bundle", tmp_path / "m.onnx")
    import_network(order)
    assert np.array_equal(read_bundle(order.out).known_outputs["logits_BK"], plain)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../m.onnx.data"
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SpecError, match="outside of its folder"):
        import_network(replace(order, onnx=inner / "m.onnx"))


@pytest.mark.parametrize(
    ("change", "reason", "advice"),
    [
        (lambda text: text + "surprise = 1\n", "unknown field `surprise`", "--example"),
        (lambda text: text.replace("version", "wersion"), "wersion", "--example"),
        (lambda text: text.replace('code = { scheme = "SCT", value = "233604007", meaning = "Pneumonia" }', ""), "`code`", "SNOMED CT or RadLex code"),
        (lambda text: text.replace('"233604007"', '""'), "label pneumonia: SCT (nothing) is no code", "RADLEX"),
        (lambda text: text.replace("RID50149", "50149"), "label nodule: RADLEX 50149 is no code", "RADLEX"),
        (lambda text: text.replace('"SCT"', '"99LOCAL"'), "99LOCAL", "RADLEX"),
        (lambda text: text.replace('"Pneumonia"', f'"{"P" * 65}"'), "length <= 64", "SNOMED CT or RadLex code"),
        (lambda text: text.replace('name = "nodule"', 'name = "normal"'), "same name", "own"),
        (lambda text: text.replace("[0.0, 255.0]", "[255.0, 0.0]"), "from low to high", "--example"),
        (lambda text: text.replace("[0.0, 255.0]", "[0.0, inf]"), "not finite", "--example"),
        (lambda text: text.replace("std = [50.0]", "std = [0.0]"), "above 0", "--example"),
        (lambda text: text.replace("std = [50.0]", "std = [1.0, 2.0]"), "each channel", "--example"),
        (lambda text: text.replace("mean = [10.0]", "mean = [1.0, 2.0]").replace("std = [50.0]", "std = [1.0, 2.0]"), "2 numbers", "each channel"),
        (lambda text: text.replace("size = 32", 'size = "32"'), "Expected `int", "--example"),
        (lambda text: "= broken", "not TOML", "--example"),
    ],
)  # fmt: skip
def test_a_spec_that_is_wrong_is_refused_with_the_key(tmp_path: Path, change, reason: str, advice: str) -> None:
    path = save(tmp_path / "m.onnx", build())
    spec = write_spec(tmp_path / "s.toml")
    spec.write_text(change(spec.read_text()))
    with pytest.raises(SpecError) as caught:
        import_network(Order(spec, tmp_path / "out.bundle", path))
    assert reason in str(caught.value)
    assert advice in caught.value.advice


def test_the_example_explains_every_key() -> None:
    spec = read_spec(EXAMPLE, {})
    text = EXAMPLE.read_text()
    for struct in (spec, spec.input, spec.output, spec.explanation, spec.labels[0], spec.labels[0].code):
        for key in struct.__struct_fields__:
            assert key in text, key
    assert spec.explanation is not None


def test_weights_and_imported_do_not_go_together(tmp_path: Path, shipped) -> None:
    import msgspec

    from models.bundle import BundleParts, write_bundle

    def write(network: str, weights: dict) -> None:
        manifest = msgspec.structs.replace(shipped.manifest, network=network)
        parts = BundleParts(manifest, shipped.onnx, weights, shipped.known_inputs, shipped.known_outputs, shipped.card)
        write_bundle(tmp_path / "x.bundle", parts)

    write("imported", {})
    assert read_bundle(tmp_path / "x.bundle").weights == {}
    for network, weights in (("hybrid-nano", {}), ("imported", {"w": np.ones(1, np.float32)})):
        write(network, weights)
        with pytest.raises(BundleError, match="no weights of its own"):
            read_bundle(tmp_path / "x.bundle")


# --- the command


def run_import(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "models", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_command_prints_json_and_warns_loudly(tmp_path: Path) -> None:
    path, spec = save(tmp_path / "m.onnx", build()), write_spec(tmp_path / "s.toml")
    done = run_import("import", "--onnx", path, "--spec", spec, "--out", tmp_path / "out.bundle")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["digest"] == read_bundle(tmp_path / "out.bundle").digest
    assert report["ood_threshold"] is None
    assert "WARNING: NOT CALIBRATED" in done.stderr


def test_the_command_refuses_with_advice(tmp_path: Path) -> None:
    path, spec = save(tmp_path / "m.onnx", build(Net(batch=1))), write_spec(tmp_path / "s.toml")
    done = run_import("import", "--onnx", path, "--spec", spec, "--out", tmp_path / "out.bundle")
    assert (done.returncode, done.stdout) == (1, "")
    said = json.loads(done.stderr)
    assert "fixed" in said["error"]
    assert "export it again" in said["advice"]
    (tmp_path / "file").touch()
    path = save(tmp_path / "m.onnx", build())
    done = run_import("import", "--onnx", path, "--spec", spec, "--out", tmp_path / "file" / "out.bundle")
    assert done.returncode == 1
    assert "cannot be written" in json.loads(done.stderr)["error"]


def test_help_names_the_other_commands_and_the_example_is_printed() -> None:
    said = run_import("--help").stdout
    assert "python -m models.training" in said
    assert "python -m models.export" in said
    assert run_import("import", "--example").stdout == EXAMPLE.read_text()
    assert run_import("import", "--onnx", "m.onnx").returncode == 2


def test_a_machine_without_onnx_is_told_what_to_install() -> None:
    code = "import sys; sys.modules['onnx'] = None; from models.__main__ import main; sys.exit(main(['import']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    said = json.loads(done.stderr)
    assert said["error"] == "onnx is not installed"
    assert "train" in said["advice"]
