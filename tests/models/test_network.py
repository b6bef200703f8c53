"""What the graph promises: the map is the decision, padding is nothing, B and S are free."""

import numpy as np
import pytest

from models.bundle import INPUT_NAMES, OUTPUT_NAMES, Arrays, Bundle
from models.tasks import INPUTS, TASKS

torch = pytest.importorskip("torch", reason="the network needs the extra `train`")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def network():
    from models.restore import new_network

    return new_network("hybrid-nano", TASKS, INPUTS, seed=0).eval()


def run(network, inputs: Arrays) -> Arrays:
    from models.export import run_torch

    return run_torch(network, {name: inputs[name] for name in INPUT_NAMES})


def series(slices: int, modality: int, seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "slices_BSHW": generator.uniform(-1, 1, (1, slices, 96, 96)).astype(np.float32),
        "slice_mask_BS": np.ones((1, slices), bool),
        "modality_B": np.array([modality]),
    }


def test_shapes_of_the_outputs(network) -> None:
    outputs = run(network, series(5, 1))
    shapes = {name: outputs[name].shape for name in OUTPUT_NAMES}
    assert shapes == {
        "logits_BK": (1, 9),
        "map_BSKhw": (1, 5, 9, 12, 12),
        "slice_weights_BS": (1, 5),
        "ood_B": (1,),
    }


def test_the_map_adds_up_to_the_logit(network) -> None:
    outputs = run(network, series(4, 2))
    bias_K = network.head.bias.detach().numpy()
    np.testing.assert_allclose(outputs["map_BSKhw"].sum((1, 3, 4)) + bias_K, outputs["logits_BK"], atol=1e-4)
    np.testing.assert_allclose(outputs["slice_weights_BS"].sum(1), 1.0, atol=1e-5)


def test_padding_changes_nothing(network) -> None:
    plain = series(3, 1)
    padded = {
        "slices_BSHW": np.concatenate([plain["slices_BSHW"], np.full((1, 2, 96, 96), 0.7, np.float32)], 1),
        "slice_mask_BS": np.array([[True, True, True, False, False]]),
        "modality_B": plain["modality_B"],
    }
    with_padding, without = run(network, padded), run(network, plain)
    np.testing.assert_allclose(with_padding["logits_BK"], without["logits_BK"], atol=1e-5)
    np.testing.assert_allclose(with_padding["ood_B"], without["ood_B"], rtol=1e-4)
    assert with_padding["slice_weights_BS"][0, 3:].max() < 1e-6


def test_the_order_of_slices_does_not_matter(network) -> None:
    plain = series(3, 1)
    turned = plain | {"slices_BSHW": np.ascontiguousarray(plain["slices_BSHW"][:, ::-1])}
    np.testing.assert_allclose(run(network, turned)["logits_BK"], run(network, plain)["logits_BK"], atol=1e-5)


def test_it_has_no_batch_statistics_and_is_small(network) -> None:
    assert not [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert 0.5e6 < sum(parameter.numel() for parameter in network.parameters()) < 1.0e6


def test_an_unknown_network_is_refused() -> None:
    from models.errors import BundleError
    from models.network import config_of

    with pytest.raises(BundleError, match="hybrid-huge is not known"):
        config_of("hybrid-huge", TASKS, INPUTS)


def test_the_shipped_weights_are_the_shipped_graph(shipped: Bundle, run_shipped) -> None:
    from models.restore import network_of

    inputs = shipped.known_inputs
    by_torch = run(network_of(shipped), inputs)
    for name, array in run_shipped(inputs).items():
        np.testing.assert_allclose(array, by_torch[name], atol=1e-4, rtol=1e-4)
