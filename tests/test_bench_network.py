"""The network's bench: its rivals' sizes, its rows, its splits. Not its figures."""

from pathlib import Path

import pytest

from benchmarks.network import images, results
from models.spec import MODALITIES
from models.tasks import INPUTS, TASKS


def test_a_row_is_measured_once_and_anew_for_other_settings(tmp_path: Path) -> None:
    measured = []

    def measure() -> results.Row:
        measured.append(1)
        return {"figure": len(measured)}

    said: list[str] = []
    kept = results.Results(tmp_path, said.append)
    assert kept.row("speed", {"threads": 1}, measure) == {"threads": 1, "figure": 1}
    assert results.Results(tmp_path, said.append).row("speed", {"threads": 1}, measure)["figure"] == 1
    assert kept.row("speed", {"threads": 2}, measure)["figure"] == 2
    assert [text.endswith("(kept from before)") for text in said] == [False, True, False]


def test_a_row_that_fails_is_not_kept(tmp_path: Path) -> None:
    def fail() -> results.Row:
        raise RuntimeError("the machine stopped")

    kept = results.Results(tmp_path, lambda text: None)
    with pytest.raises(RuntimeError):
        kept.row("speed", {}, fail)
    assert kept.row("speed", {}, lambda: {"figure": 1}) == {"figure": 1}


@pytest.mark.slow
@pytest.mark.parametrize("size", ["hybrid-tiny", "hybrid-small"])
def test_cuts_have_as_many_parameters_as_the_hybrid(size: str) -> None:
    import torch

    from benchmarks.network import rivals
    from models.network import config_of

    config = config_of(size, TASKS, INPUTS)
    counts = {}
    for name in ("hybrid", "convolution only", "transformer only"):
        network = rivals.NETWORKS[name](config)
        counts[name] = sum(p.numel() for key, p in network.named_parameters() if not key.startswith("ood_"))
        seen = network.attended(torch.zeros(2, 1, 96, 96), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2).long())
        assert network.head(seen.pooled_BD).shape == (2, 9)
    assert max(counts.values()) / min(counts.values()) < 1.15


@pytest.mark.slow
def test_grad_cam_points_at_what_the_logit_follows() -> None:
    import torch

    from benchmarks.network import explanation
    from models.bundle import SHIPPED, read_bundle
    from models.phantoms import phantom
    from models.pretraining import example_of
    from models.restore import network_of

    drawn = phantom("XR", "nodule", 20_000_123)
    example = example_of(drawn, TASKS[0], 1)
    network = network_of(read_bundle(SHIPPED))
    map_HW = explanation.grad_cam(network, example)
    assert map_HW.shape == example.slices_SHW.shape[1:]
    assert map_HW.min() >= 0.0
    assert map_HW.max() > 0.0
    assert all(parameter.grad is None or not torch.any(parameter.grad) for parameter in network.parameters())


@pytest.mark.skipif(not images.are_here(), reason="the labelled images are not beside the repository")
@pytest.mark.parametrize("name", list(images.SETS))
def test_a_set_is_split_as_its_readme_says(name: str) -> None:
    read = images.collection(name, 32, keep_apart=images.OTHER_HOSPITAL if name == "covid" else "")
    assert read.task.modality in MODALITIES
    share = len(read.calibration) / (len(read.calibration) + len(read.training))
    assert 0.1 < share < 0.2
    assert {e.label for e in read.training} == {e.label for e in read.calibration}
    assert len(read.other) == (93 if name == "covid" else 0)
    counts = {"pneumonia": 524, "covid": 153, "ct": 160, "mri": 282}
    assert len(read.validation) == counts[name]
