"""The laboratory for real images, on drawn ones: it learns, its bundle is whole, its card says what was measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.bundle import Bundle, check_known_answer, read_bundle
from tests.models.archive_support import ONE_TASK, SIDE_PX, write_archives, write_tasks
from tests.models.conftest import session_of

pytestmark = pytest.mark.slow


def run(folder: Path, *more: str, tasks: Path | None = None) -> int:
    from models.training import main

    command = ["images", "--tasks", str(tasks or write_tasks(folder)), "--data", str(folder)]
    command += ["--out", str(folder / "out.bundle"), "--network", "hybrid-nano", "--size", str(SIDE_PX)]
    return main([*command, "--budget-minutes", "10", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    write_archives(folder)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> Bundle:
    from models import archive_training

    with pytest.MonkeyPatch.context() as patch:  # by epochs, not by the time of a busy machine
        patch.setattr(archive_training, "PLAN", replace(archive_training.PLAN, epochs=8, averaging=0.9))
        assert run(folder) == 0
    return read_bundle(folder / "out.bundle")


def test_it_learns_both_tasks_and_knows_a_stranger(folder: Path, made: Bundle) -> None:
    from models.archive_training import noise
    from models.archives import parts_of, read_archive
    from models.laboratory import reading
    from models.predicting import predict
    from models.restore import network_of
    from models.task_file import read_task_file

    network, manifest = network_of(made), made.manifest
    sources = read_task_file(folder / "tasks.toml").tasks
    for source, task, spec in zip(sources, manifest.tasks, manifest.inputs, strict=True):
        unseen = parts_of(read_archive(folder / source.archive), source, task, spec).validation
        seen = reading(network, manifest, task, unseen)
        assert seen.accuracy > 0.9
        assert seen.is_covered_N.mean() > 0.8
        assert seen.answered > 0.5
        if task.modality == "CT":  # the drawn slices are dark; the drawn X-rays are noise themselves
            (own,), (odd,) = (predict(network, examples).values() for examples in (unseen, noise(task, SIDE_PX, 0)))
            assert odd.ood_N.min() > 2.0 * np.quantile(own.ood_N, 0.99)


def test_the_bundle_is_calibrated_gives_its_known_answers_and_holds_no_image(folder: Path, made: Bundle) -> None:
    check_known_answer(session_of(made.onnx), made)
    assert made.manifest.parameters > 500_000
    assert all(task.conformal_threshold > 0 and task.reference is not None for task in made.manifest.tasks)
    known_BSHW = made.known_inputs["slices_BSHW"]
    assert known_BSHW.shape == (2, 4, SIDE_PX, SIDE_PX)
    assert made.known_inputs["modality_B"].tolist() == [0, 1]
    images_NHW = np.load(folder / "squares.npz")["images"] / 127.5 - 1
    nearest = min(np.abs(slice_HW - images_NHW).mean((1, 2)).min() for slice_HW in known_BSHW[1])
    assert nearest > 0.1


def test_the_card_names_licences_codes_and_measured_intervals(made: Bundle) -> None:
    for said in ("CC0, for the taking", "Drawn by the test's author.", "SCT 233604007", "186 images", "Stripes only."):
        assert said in made.card
    rows = [row for row in made.card.splitlines() if row.startswith("| chest-ct | ") and "–" in row]
    assert len(rows) == 2
    accuracy = rows[0].split("|")[2].split()[0]
    assert float(accuracy) > 0.9
    assert "{" not in made.card


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--size", "40"), "images of 40 pixels"),
        (("--size", "2048"), "images of 2048 pixels"),
        (("--data", "/nowhere"), "squares.npz cannot be read"),
        (("--out", "/"), "is a folder"),
        (("--out", "/dev/null/one.bundle"), "cannot be written"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(
    folder: Path, options: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *options) == 1
    said = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert reason in said["error"]
    assert said["advice"]


def test_several_processes_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert run(folder) == 1
    assert "one process" in capsys.readouterr().err


def test_small_sets_are_repeated_to_as_many_steps() -> None:
    from models.archive_training import evened
    from models.examples import Example
    from models.tasks import TASKS

    few, many = (
        [Example(np.zeros((1, 1, 1), np.float16), task, 0)] * n for task, n in zip(TASKS[:2], (3, 10), strict=True)
    )
    assert [example.task.modality for example in evened([few, many])] == ["XR"] * 9 + ["CT"] * 10


def test_a_single_task_has_no_other_anatomy(folder: Path, tmp_path: Path) -> None:
    assert (
        run(
            folder,
            "--budget-minutes",
            "0.01",
            "--out",
            str(tmp_path / "one.bundle"),
            tasks=write_tasks(tmp_path, ONE_TASK),
        )
        == 0
    )
    card = read_bundle(tmp_path / "one.bundle").card
    assert card.count("| chest-ct | ") == 6  # two labels twice, scores, answers
    assert "| – |" in card
