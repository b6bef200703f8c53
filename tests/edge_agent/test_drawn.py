"""A share of the weights with the real training child: what the plan draws is trained, travels and arrives; nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge_agent import learn, update
from edge_agent.config import Learning
from fleet_link.messages import RoundPlan
from fleet_link.sealing import plan_digest
from models import addable, delta, round_layout
from models.bundle import Bundle, read_bundle
from models.delta import FIXED_PREFIX
from models.layout import Layout
from tests.edge_agent.link_support import make_plan

pytest.importorskip("torch", reason="training needs the extra `train`")
pytestmark = pytest.mark.slow
BOXES = ("box-1", "box-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from tests.models.learning import write_fresh_bundle

    return read_bundle(write_fresh_bundle(tmp_path_factory.mktemp("base") / "fresh.bundle"))


def plan_for(base: Bundle, **changes: object) -> RoundPlan:
    numbers: dict[str, object] = {"word_bits": 16, "value_bits": 12, "boxes_max": 8, "examples_cap": 9}
    return make_plan("a" * 64, b"k" * 32, kind="masked", learning_rate=0.004, clip_norm=10.0, **(numbers | changes))


def trained(base: Bundle, plan: RoundPlan, folder: Path, first_seed: int) -> learn.Trained:
    from tests.models.test_training import write_examples

    write_examples(folder, per_label=2, modalities=("XR",), first_seed=first_seed)
    settings = Learning(threads=1, nice=0, timeout_s=240.0, heldout_fraction=0.25, replay_max=0)
    return learn.train(plan, base, folder, settings, lambda: False)


def hubs_layout(base: Bundle, plan: RoundPlan) -> Layout:
    """As cloud_hub/collection.py makes it: from the plan and the base alone."""
    names = delta.trainable_names(base.weights, plan.trainable)
    return round_layout.layout_of(plan, plan_digest(plan), {name: base.weights[name].shape for name in names})


def test_what_the_plan_draws_is_trained_and_arrives_in_a_fiftieth_of_the_bytes(base: Bundle, tmp_path: Path) -> None:
    plan = plan_for(base, share=0.033)
    layout = hubs_layout(base, plan)
    weights = [trained(base, plan, tmp_path / name, 1000 * i).weights for i, name in enumerate(BOXES)]
    words = [update.to_words(update.change_of(base.weights, after, plan), plan, 9).words for after in weights]
    mean = addable.decode_sum(words[0] + words[1], layout)
    for name, mask in layout.drawn.masks().items():
        changes = [after[name] - base.weights[name] for after in weights]
        assert not any(change[~mask].any() for change in changes), name
        assert mean[name] == pytest.approx(np.mean(changes, axis=0), abs=4 * layout.step), name
    assert sum(np.count_nonzero(value) for value in mean.values()) > 0.9 * layout.chosen
    assert all((after[n] == base.weights[n]).all() for after in weights for n in after if n.startswith(FIXED_PREFIX))
    print(f"{layout.size * 4} bytes of float32, {words[0].nbytes} of words")
    assert layout.size * 4 / words[0].nbytes > 50


def test_a_plan_of_all_weights_trains_them_all(base: Bundle, tmp_path: Path) -> None:
    """The same child without a share; what it made is no update of a plan with one."""
    weights = trained(base, plan_for(base), tmp_path, 0).weights
    masks = hubs_layout(base, plan_for(base, share=0.033)).drawn.masks()
    assert any((weights[name] != base.weights[name])[~mask].any() for name, mask in masks.items())
    plan = plan_for(base, share=0.033)
    change = update.change_of(base.weights, weights, plan)
    with pytest.raises(learn.CannotTrainError, match="moved where the round does not move it"):
        update.to_words(change, plan, 9)


def test_the_child_that_is_given_a_share_of_adapters_says_why_not(base: Bundle, tmp_path: Path) -> None:
    with pytest.raises(learn.CannotTrainError, match="adapters change whole matrices"):
        trained(base, plan_for(base, share=0.5, trainable="adapters"), tmp_path, 0)
    assert "adapters" in json.loads((tmp_path / "child.log").read_text().splitlines()[-1])["error"]
