"""The bundle that ships: good on what it was trained for, worse on other scanners, and it knows a stranger."""

import numpy as np
import pytest

from models.bundle import SHIPPED, Bundle, check_known_answer, read_bundle
from models.calibration import softmax
from models.phantoms import BASE, LABELS, LOOKS, SiteLook, phantom
from models.preprocess import Volume, prepare
from models.spec import MODALITIES, TaskSpec
from tests.models.conftest import SessionRun, one_series, session_of

pytestmark = pytest.mark.slow

FIRST_SEED = 40_000_000  # far from those of training, calibration and the card
PER_LABEL = 12


def read(bundle: Bundle, run: SessionRun, volume: Volume) -> dict[str, np.ndarray]:
    spec = bundle.manifest.input_for(volume.modality)
    assert spec is not None
    return run(one_series(prepare(volume, spec).slices_SHW, MODALITIES.index(volume.modality)))


def accuracy(bundle: Bundle, run: SessionRun, task: TaskSpec, look: SiteLook) -> float:
    right = []
    for k, label in enumerate(LABELS[task.modality]):
        for seed in range(FIRST_SEED, FIRST_SEED + PER_LABEL):
            logits_K = read(bundle, run, phantom(task.modality, label, seed, look).volume)["logits_BK"][0]
            right.append(int(logits_K[task.offset : task.offset + len(task.labels)].argmax()) == k)
    return float(np.mean(right))


def test_it_gives_its_known_answers(shipped: Bundle, run_shipped: SessionRun) -> None:
    check_known_answer(run_shipped, shipped)


def test_it_reads_its_own_scanner_well_and_other_hospitals_worse(shipped: Bundle, run_shipped: SessionRun) -> None:
    tasks = shipped.manifest.tasks
    own = np.mean([accuracy(shipped, run_shipped, task, BASE) for task in tasks])
    north, south = (
        np.mean([accuracy(shipped, run_shipped, task, LOOKS[name]) for task in tasks]) for name in ("north", "south")
    )
    assert own >= 0.9
    assert 0.5 <= north <= own - 0.05
    assert 0.5 <= south <= own - 0.05


@pytest.mark.parametrize("modality", MODALITIES)
def test_strangers_are_out_of_distribution_and_own_images_are_not(
    shipped: Bundle, run_shipped: SessionRun, modality: str
) -> None:
    shape = phantom(modality, "normal", 0).volume.voxels_ZYX.shape
    generator = np.random.default_rng(0)
    other = MODALITIES[(MODALITIES.index(modality) + 1) % 3]
    anatomy = phantom(other, "normal", 1).volume.voxels_ZYX
    strangers = [
        generator.normal(-500, 500, shape).astype(np.float32),
        (anatomy - anatomy.min()) / np.ptp(anatomy) * 1500 - 1250,
    ]
    threshold = shipped.manifest.ood_threshold
    for voxels_ZYX in strangers:
        volume = Volume(voxels_ZYX.astype(np.float32), (1.0, 1.0, 1.0), modality)
        assert read(shipped, run_shipped, volume)["ood_B"][0] > threshold
    for look in LOOKS.values():
        scores = [
            read(shipped, run_shipped, phantom(modality, label, FIRST_SEED + n, look).volume)["ood_B"][0]
            for label in LABELS[modality]
            for n in range(4)
        ]
        assert np.mean(np.array(scores) <= threshold) >= 0.75


def test_its_explanation_points_at_the_lesion(shipped: Bundle, run_shipped: SessionRun) -> None:
    hits = []
    for task in shipped.manifest.tasks:
        spec = shipped.manifest.input_for(task.modality)
        assert spec is not None
        for seed in range(FIRST_SEED, FIRST_SEED + 8):
            drawn = phantom(task.modality, LABELS[task.modality][1], seed)
            prepared = prepare(drawn.volume, spec)
            outputs = run_shipped(one_series(prepared.slices_SHW, MODALITIES.index(task.modality)))
            s = int(outputs["slice_weights_BS"][0].argmax())
            map_YX = prepared.letterbox.map_to_source(outputs["map_BSKhw"][0, s, task.offset + 1])
            row, column = np.unravel_index(map_YX.argmax(), map_YX.shape)
            near_YX = drawn.lesion_ZYX[prepared.source_index_S[s]]
            reach = map_YX.shape[0] // 12  # one place of the map
            hits.append(
                near_YX[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1].any()
            )
    assert np.mean(hits) >= 0.8


def test_its_probabilities_are_calibrated_enough_to_answer(shipped: Bundle, run_shipped: SessionRun) -> None:
    answered, right = [], []
    for task in shipped.manifest.tasks:
        for k, label in enumerate(LABELS[task.modality]):
            for seed in range(FIRST_SEED, FIRST_SEED + 8):
                logits_K = read(shipped, run_shipped, phantom(task.modality, label, seed).volume)["logits_BK"][0]
                own_K = softmax(logits_K[task.offset : task.offset + len(task.labels)], task.temperature)
                inside_K = own_K >= task.conformal_threshold
                answered.append(inside_K.sum() == 1)
                right.append(inside_K[k])
    assert np.mean(answered) >= 0.85
    assert np.mean(right) >= 0.85


def test_its_card_says_what_it_is(shipped: Bundle) -> None:
    assert "Not a medical device" in shipped.card
    assert "python -m models.training pretrain" in shipped.card
    for look in LOOKS:
        assert f"| {look} |" in shipped.card


@pytest.fixture(scope="module")
def chest() -> Bundle:
    return read_bundle(SHIPPED.with_name("chest-small.bundle"))


def test_the_chest_bundle_gives_its_known_answers_and_names_codes_and_licences(chest: Bundle) -> None:
    check_known_answer(session_of(chest.onnx), chest)
    assert chest.manifest.network == "hybrid-small"
    assert {label.code.scheme for task in chest.manifest.tasks for label in task.labels} == {"SCT"}
    assert chest.card.count("Licence: CC BY 4.0") == len(chest.manifest.tasks)


@pytest.mark.parametrize("modality", ["XR", "CT"])
def test_the_chest_bundle_takes_no_noise_for_a_patient(chest: Bundle, modality: str) -> None:
    noise_ZYX = np.random.default_rng(0).uniform(0.0, 350.0, (1, 256, 256)).astype(np.float32)
    seen = read(chest, session_of(chest.onnx), Volume(noise_ZYX, (1.0, 1.0, 1.0), modality))
    assert seen["ood_B"][0] > chest.manifest.ood_threshold
