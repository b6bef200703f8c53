"""A MONAI Bundle becomes a Wardround bundle: from its graph, its TorchScript, or its configured network."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="importing a MONAI Bundle needs the extra `train`")

from models import monai_bundle  # noqa: E402
from models.bundle import read_bundle  # noqa: E402
from models.errors import SpecError  # noqa: E402
from models.importing import Order, import_network  # noqa: E402
from tests.models.conftest import session_of  # noqa: E402
from tests.models.import_support import EXPLAINED, SIZE, Net, build, save, write_spec  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CHANNELS = {"0": "nodule", "1": "normal", "2": "pneumonia"}  # not the spec's order
NETWORK = {
    "_target_": "monai.networks.nets.Classifier",
    "in_shape": [1, SIZE, SIZE],
    "classes": 3,
    "channels": [4, 8],
    "strides": [2, 2],
}


def metadata(**image: object) -> dict:
    described = {"type": "image", "num_channels": 1, "spatial_shape": [SIZE, SIZE], "value_range": [0, 255]}
    return {
        "version": "0.4.2",
        "name": "Chest classifier",
        "network_data_format": {
            "inputs": {"image": described | image},
            "outputs": {"pred": {"type": "probabilities", "num_channels": 3, "channel_def": dict(CHANNELS)}},
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle without a network."""
    made = tmp_path / "chest"
    (made / "configs").mkdir(parents=True)
    (made / "models").mkdir()
    (made / "configs" / "metadata.json").write_text(json.dumps(metadata()))
    return made


def take(source: Path, tmp_path: Path, *, trust_code: bool = False, **spec: object):
    if "range" not in spec:  # the metadata says it
        spec["range"] = "[0.0, 255.0]"
    order = Order(write_spec(tmp_path / "s.toml", **spec), tmp_path / "out.bundle", monai=source, trust_code=trust_code)
    return import_network(order)


def refusal(source: Path, tmp_path: Path, **options: object) -> str:
    with pytest.raises(SpecError) as caught:
        take(source, tmp_path, **options)  # type: ignore[arg-type]
    assert caught.value.advice
    assert not (tmp_path / "out.bundle").exists()
    return f"{caught.value} ({caught.value.advice})"


def logits(tmp_path: Path, slices_NHW: np.ndarray) -> np.ndarray:
    count = len(slices_NHW)
    inputs = {"slices_BSHW": slices_NHW[:, None], "slice_mask_BS": np.ones((count, 1), bool)}
    return session_of(read_bundle(tmp_path / "out.bundle").onnx)(inputs | {"modality_B": np.zeros(count, np.int64)})[
        "logits_BK"
    ]


def shown(slices_NHW: np.ndarray) -> "torch.Tensor":
    """What the spec makes of slices, by hand."""
    return torch.from_numpy(((slices_NHW[:, None] + 1) / 2 * 255 - 10) / 50)


SLICES_NHW = np.random.default_rng(3).uniform(-1, 1, (3, SIZE, SIZE)).astype(np.float32)


def test_its_graph_is_taken_first_and_its_labels_order_counts(folder: Path, tmp_path: Path) -> None:
    save(folder / "models" / "model.onnx", build(Net(side="side")))
    (folder / "models" / "model.ts").write_bytes(b"not looked at")
    take(folder, tmp_path, size="", explanation=EXPLAINED)
    manifest = read_bundle(tmp_path / "out.bundle").manifest
    assert [label.name for label in manifest.tasks[0].labels] == ["nodule", "normal", "pneumonia"]
    assert manifest.inputs[0].size == SIZE


def test_the_metadata_fills_what_the_spec_leaves_out(folder: Path, tmp_path: Path) -> None:
    found = monai_bundle.open_bundle(folder, tmp_path)
    assert found.defaults == {
        "name": "Chest classifier",
        "version": "0.4.2",
        "input": {"size": SIZE, "range": (0.0, 255.0)},
    }
    save(folder / "models" / "model.onnx", build())
    spec = write_spec(tmp_path / "s.toml", size="")
    kept = [
        line
        for line in spec.read_text().splitlines()
        if not line.startswith(("version", "range", 'name = "elsewhere"'))
    ]
    spec.write_text("\n".join(kept))
    import_network(Order(spec, tmp_path / "out.bundle", monai=folder))
    manifest = read_bundle(tmp_path / "out.bundle").manifest
    assert (manifest.name, manifest.version) == ("Chest classifier", "0.4.2")


class Net2d(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(1, 4, 3, 2, 1)
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.convolution(x)).mean((2, 3)))


def test_torchscript_is_run_only_where_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Net2d().eval()
    torch.jit.script(network).save(folder / "models" / "model.ts")
    assert "TorchScript, which is code" in refusal(folder, tmp_path)
    take(folder, tmp_path, trust_code=True)
    with torch.no_grad():
        assert logits(tmp_path, SLICES_NHW) == pytest.approx(network(shown(SLICES_NHW)).numpy(), rel=1e-3, abs=1e-3)


def test_torchscript_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "models" / "model.ts").write_bytes(b"nothing")
    assert "model.ts cannot be read" in refusal(folder, tmp_path, trust_code=True)


@pytest.fixture
def configured(folder: Path) -> Path:
    nets = pytest.importorskip("monai.networks.nets", reason="needs MONAI: the extra `import` or `dev`")
    torch.manual_seed(0)
    arguments = {key: value for key, value in NETWORK.items() if not key.startswith("_")}
    torch.save(nets.Classifier(**arguments).state_dict(), folder / "models" / "model.pt")
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": NETWORK}))
    return folder


def test_the_configured_network_is_built_only_where_it_is_trusted(configured: Path, tmp_path: Path) -> None:
    from monai.networks.nets import Classifier

    assert "names classes to run" in refusal(configured, tmp_path)
    take(configured, tmp_path, trust_code=True)
    network = Classifier(in_shape=(1, SIZE, SIZE), classes=3, channels=(4, 8), strides=(2, 2)).eval()
    network.load_state_dict(torch.load(configured / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        assert logits(tmp_path, SLICES_NHW) == pytest.approx(network(shown(SLICES_NHW)).numpy(), rel=1e-3, abs=1e-3)


def test_a_yaml_configuration_and_a_zip_do_too(configured: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML: the extra `import` or `dev`")
    (configured / "configs" / "inference.json").unlink()
    (configured / "configs" / "inference.yaml").write_text(yaml.safe_dump({"network": NETWORK}))
    with zipfile.ZipFile(tmp_path / "chest.zip", "w") as archive:
        for path in sorted(configured.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    take(tmp_path / "chest.zip", tmp_path, trust_code=True)


def test_a_pickle_is_never_opened(configured: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"model": Evil()}, configured / "models" / "model.pt")
    assert "more than tensors" in refusal(configured, tmp_path, trust_code=True)
    assert not (tmp_path / "was-run").exists()


def test_weights_of_another_network_are_refused(configured: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, configured / "models" / "model.pt")
    assert "gives no network with the weights" in refusal(configured, tmp_path, trust_code=True)
    (configured / "configs" / "inference.json").write_text('{"network_def": {"_target_": "nowhere.Net"}}')
    assert "gives no network with the weights" in refusal(configured, tmp_path, trust_code=True)
    (configured / "configs" / "inference.json").write_text('{"trainer": {}}')
    assert "no network_def or network" in refusal(configured, tmp_path, trust_code=True)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"spatial_shape": [96, 96, 96]}, "reads 3-D images"),
        ({"num_channels": 4}, "4 channels"),
    ],
)
def test_what_is_no_2d_classifier_is_refused(folder: Path, tmp_path: Path, image: dict, reason: str) -> None:
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata(**image)))
    assert reason in refusal(folder, tmp_path)


def test_a_segmentation_and_two_outputs_are_refused(folder: Path, tmp_path: Path) -> None:
    said = metadata()
    outputs = said["network_data_format"]["outputs"]
    outputs["pred"]["format"] = "segmentation"
    (folder / "configs" / "metadata.json").write_text(json.dumps(said))
    assert "the bundle segments" in refusal(folder, tmp_path)
    outputs["other"] = {}
    (folder / "configs" / "metadata.json").write_text(json.dumps(said))
    assert "1 inputs and 2 outputs" in refusal(folder, tmp_path)


def test_labels_other_than_the_metadatas_are_refused(folder: Path, tmp_path: Path) -> None:
    save(folder / "models" / "model.onnx", build())
    said = metadata()
    said["network_data_format"]["outputs"]["pred"]["channel_def"]["2"] = "covid"
    (folder / "configs" / "metadata.json").write_text(json.dumps(said))
    assert "not those of the bundle's metadata: nodule, normal, covid" in refusal(folder, tmp_path)


def test_a_bundle_without_a_network_or_metadata_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "no models/model.onnx" in refusal(folder, tmp_path)
    (folder / "configs" / "metadata.json").write_text("{")
    assert "metadata.json cannot be used" in refusal(folder, tmp_path)
    (folder / "configs" / "metadata.json").unlink()
    assert "no MONAI Bundle" in refusal(folder, tmp_path)
    assert "no MONAI Bundle" in refusal(tmp_path / "gone", tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\evil"])
def test_a_zip_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("configs/metadata.json", json.dumps(metadata()))
        archive.writestr(name, b"x")
    assert "leads out of it" in refusal(tmp_path / "b.zip", tmp_path)


def test_a_zip_with_a_link_too_large_or_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = zipfile.ZipInfo("models")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(link, "/etc")
    assert "leads out of it" in refusal(tmp_path / "b.zip", tmp_path)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("configs/metadata.json", json.dumps(metadata()))
    monkeypatch.setattr(monai_bundle, "MAX_ZIP_BYTES", 10)
    assert "more than 10 bytes" in refusal(tmp_path / "b.zip", tmp_path)
    (tmp_path / "b.zip").write_bytes(b"no zip")
    assert "cannot be unpacked" in refusal(tmp_path / "b.zip", tmp_path)
