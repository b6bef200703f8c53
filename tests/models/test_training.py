"""Fine-tuning as the box runs it: a child process on an example folder."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from models.bundle import SHIPPED, Bundle
from models.phantoms import LABELS, LOOKS, phantom
from models.preprocess import prepare
from models.tasks import INPUTS

pytestmark = pytest.mark.slow


def write_examples(
    folder: Path, per_label: int, modalities: tuple[str, ...] = ("XR", "MR"), first_seed: int = 30_000_000
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for modality in modalities:
        spec = next(spec for spec in INPUTS if spec.modality == modality)
        for label in LABELS[modality]:
            for n in range(per_label):
                name = f"{modality}-{label}-{n}.npz"
                prepared = prepare(phantom(modality, label, first_seed + n, LOOKS["north"]).volume, spec)
                np.savez(folder / name, slices_SHW=prepared.slices_SHW.astype(np.float16))
                split = "heldout" if n % 2 else "train"
                rows.append({"path": name, "modality": modality, "label": label, "split": split})
    (folder / "examples.json").write_text(json.dumps(rows))
    return folder


def finetune(examples: Path, out: Path, *more: str, bundle: Path = SHIPPED) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "models.training",
        "finetune",
        "--bundle",
        str(bundle),
        "--examples",
        str(examples),
    ]
    return subprocess.run([*command, "--out", str(out), *more], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("examples"), per_label=4)


def test_it_trains_reports_and_repeats(tmp_path: Path, examples: Path, shipped: Bundle) -> None:
    first = finetune(examples, tmp_path / "a", "--epochs", "3", "--seed", "5")
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert (report["examples"], report["heldout"]) == (12, 12)
    assert 0 <= report["heldout_correct_before"] <= 12
    assert 0 <= report["heldout_correct_after"] <= 12
    assert report["peak_rss_bytes"] > 50_000_000
    assert report["seconds"] > 0
    weights = safetensors_numpy.load_file(tmp_path / "a" / "weights.safetensors")
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in shipped.weights.items()
    }
    changed = {name for name, value in weights.items() if not np.array_equal(value, shipped.weights[name])}
    assert "head.weight" in changed
    assert not any(name.startswith("ood_") for name in changed)
    assert finetune(examples, tmp_path / "b", "--epochs", "3", "--seed", "5").returncode == 0
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()


def test_it_learns_what_it_is_shown(tmp_path: Path, examples: Path) -> None:
    assert finetune(examples, tmp_path, "--epochs", "6").returncode == 0
    losses = json.loads((tmp_path / "report.json").read_text())["loss_by_epoch"]
    assert losses[-1] < losses[0]


def test_killed_and_started_again_it_ends_with_the_same_weights(tmp_path: Path, examples: Path) -> None:
    options = ["--epochs", "6", "--trainable", "adapters", "--averaging", "0.9"]
    assert finetune(examples, tmp_path / "whole", *options).returncode == 0
    resumable = [*options, "--resume", str(tmp_path / "checkpoint")]
    command = [sys.executable, "-m", "models.training", "finetune", "--bundle", str(SHIPPED)]
    command += ["--examples", str(examples), "--out", str(tmp_path / "again"), *resumable]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(3):  # two epochs are kept for certain
            assert child.stdout.readline()
        child.kill()
    assert not (tmp_path / "again").exists()
    again = finetune(examples, tmp_path / "again", *resumable)
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.splitlines()) < 6
    whole, resumed = ((tmp_path / out / "weights.safetensors").read_bytes() for out in ("whole", "again"))
    assert whole == resumed


def test_a_refused_run_leaves_the_last_result_whole(tmp_path: Path, examples: Path) -> None:
    assert finetune(examples, tmp_path, "--epochs", "1", "--trainable", "heads").returncode == 0
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert finetune(examples, tmp_path, "--epochs", "2", "--lr", "1e30").returncode == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_heads_leave_the_rest_as_it_was(tmp_path: Path, examples: Path, shipped: Bundle) -> None:
    assert finetune(examples, tmp_path, "--epochs", "1", "--trainable", "heads").returncode == 0
    weights = safetensors_numpy.load_file(tmp_path / "weights.safetensors")
    changed = {name for name, value in weights.items() if not np.array_equal(value, shipped.weights[name])}
    assert changed == {"head.weight", "head.bias"}


def rewritten(folder: Path, **change: str) -> None:
    rows = json.loads((folder / "examples.json").read_text())
    rows[0].update(change)
    (folder / "examples.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "examples.json").unlink(), "examples.json cannot be used"),
        (lambda folder: (folder / "examples.json").write_text("{"), "examples.json cannot be used"),
        (lambda folder: (folder / "examples.json").write_text("[]"), "no example to train on"),
        (lambda folder: rewritten(folder, label="fracture"), "has no label fracture"),
        (lambda folder: rewritten(folder, modality="US"), "examples.json cannot be used"),
        (lambda folder: rewritten(folder, path="../examples.json"), "in the example folder itself"),
        (lambda folder: rewritten(folder, path="gone.npz"), "gone.npz: cannot be read"),
        (
            lambda folder: (folder / "XR-normal-0.npz").write_bytes(b"PK\3\4 not a zip"),
            "XR-normal-0.npz: cannot be read",
        ),
        (lambda folder: np.savez(folder / "XR-normal-0.npz", other=np.zeros(3)), "XR-normal-0.npz: cannot be read"),
        (lambda folder: np.savez(folder / "XR-normal-0.npz", slices_SHW=np.zeros((1, 95, 96), "f2")), "do not fit"),
        (lambda folder: np.savez(folder / "XR-normal-0.npz", slices_SHW=np.full((1, 96, 96), np.nan, "f2")), "NaN"),
    ],
)
def test_examples_that_do_not_fit_are_refused_with_the_reason(
    tmp_path: Path, harm: Callable[[Path], None], reason: str
) -> None:
    folder = write_examples(tmp_path / "examples", per_label=1, modalities=("XR",))
    harm(folder)
    refused = finetune(folder, tmp_path / "out", "--epochs", "1")
    assert refused.returncode == 1
    assert reason in json.loads(refused.stderr.splitlines()[-1])["error"]
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_is_refused_and_leaves_no_weights(tmp_path: Path, examples: Path) -> None:
    refused = finetune(examples, tmp_path / "out", "--epochs", "2", "--lr", "1e30")
    assert refused.returncode == 1
    assert "not finite" in json.loads(refused.stderr.splitlines()[-1])["error"]
    assert not (tmp_path / "out").exists()


def test_a_damaged_bundle_is_refused(tmp_path: Path, examples: Path) -> None:
    damaged = tmp_path / "damaged.bundle"
    damaged.write_bytes(SHIPPED.read_bytes()[:-10])
    refused = finetune(examples, tmp_path / "out", bundle=damaged)
    assert refused.returncode == 1
    assert "not a bundle" in json.loads(refused.stderr.splitlines()[-1])["error"]


@pytest.mark.parametrize(
    "wrong",
    [
        *(("--epochs", "0"), ("--batch", "0"), ("--rank", "0"), ("--threads", "0"), ("--patience", "-1")),
        *(("--lr", "nan"), ("--lr", "0"), ("--averaging", "1"), ("--proximal", "-1"), ("--seed", "-1")),
        *(("--share", "0"), ("--share", "1.1"), ("--share", "nan"), ("--share-seed", "xy")),
        *(("--dp-epsilon", "0"), ("--dp-epsilon", "inf"), ("--trainable", "none")),
    ],
)
def test_an_option_out_of_range_is_refused(
    tmp_path: Path, wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from models.training import main

    with pytest.raises(SystemExit) as refused:
        main(["finetune", "--bundle", "b", "--examples", "e", "--out", str(tmp_path), *wrong])
    assert refused.value.code == 2
    assert f"argument {wrong[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["pretrain", "images", "finetune"])
def test_the_help_explains_every_option(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    from models.training import _parser

    with pytest.raises(SystemExit):
        _parser().parse_args([action, "--help"])
    text = capsys.readouterr().out
    actions = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    for option in actions.choices[action]._actions:
        shown = re.search(rf"^  (-h, )?{option.option_strings[-1]}\b", text, re.MULTILINE)
        assert option.help
        assert bool(shown) == (option.help != argparse.SUPPRESS), option.option_strings
