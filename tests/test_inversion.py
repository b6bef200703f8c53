"""Gradient inversion by the hub: an open update gives its image away; masked words and noised sums and updates do not.

One image and one step of gradient descent in each box: the attacker's best case, which no box sends. In it a sum hides
whose image it was, but not the images from an attack on all of them at once: that is what the noise is for.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_hub import secure_sum
from cloud_hub.secure_sum import MaskedSum
from edge_agent import masking as box
from fleet_link import masking
from models import addable, delta
from models.addable import Layout
from models.delta import Arrays
from tests import masked_support

torch = pytest.importorskip("torch", reason="the attack trains, and needs the extra `train`")
from tests import inversion_support as attack  # noqa: E402  # imports torch

pytestmark = pytest.mark.slow

BOXES = 8
CLIP_NORM = 1.0
SEED = b"a round of its own"
UNREAD = 0.3  # a likeness that chance gives; the open update's is far above


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def case(number: int) -> attack.Case:
    return attack.case(7 + number)


@cache
def change(number: int) -> Arrays:
    """What box `number` learned, clipped as its plan says."""
    clipped, _ = delta.clip(attack.one_step([case(number)]), CLIP_NORM)
    return clipped


@cache
def layout(noise: float = 0.0) -> Layout:
    return Layout(attack.shapes(), SEED, CLIP_NORM, BOXES, noise=noise, noise_boxes=BOXES if noise else 0)


def words(number: int, of: Layout) -> NDArray[np.unsignedinteger]:
    generator = np.random.default_rng(number)
    encoded, _ = addable.encode(change(number), of, 1.0, generator, random_bytes=generator.bytes)
    return encoded


@cache
def masked_round(noise: float = 0.0) -> tuple[dict[str, bytes], NDArray[np.signedinteger]]:
    """What the hub of a masked round gets of each box, and the sum that it ends with."""
    names, of = masked_support.names_of(BOXES), layout(noise)
    round_ = masked_support.Round(names).keys().shares()
    for number, name in enumerate(names):
        forwarded = secure_sum.forwarded_for(
            round_.circle, round_.sharing, round_.made, name, message_id=masked_support.ID
        )
        part, round_.uploads[name] = box.mask(box.admit(round_.parts[name], forwarded), words(number, of))
        round_.parts[name] = part
    round_.told = secure_sum.settle_survivors(
        round_.circle, round_.sharing, round_.uploads, message_id=masked_support.ID
    )
    rebuilt = secure_sum.rebuild(round_.circle, round_.told, round_.agree().unmask())
    total = MaskedSum(of.word_count, 32)
    for upload in round_.uploads.values():
        total.add(upload)
    return round_.uploads, secure_sum.unmask(total, round_.circle, round_.told, rebuilt)


def read_alone(upload: bytes, of: Layout) -> Arrays:
    """One box's words read as if they were a sum: as large as a sum of the most boxes could be, its weight guessed."""
    largest = replace(of, boxes=65_000)
    read = masking.unpack(upload, of.word_count, 32).view(np.int32).astype(np.int64)
    read = read.clip(-largest.most_in_sum, largest.most_in_sum)
    read[0] = addable.WEIGHT_LEVELS
    return addable.decode_sum(read, largest)


def attacked(seen: Mapping[str, NDArray[np.floating]], truth: list[attack.Case]) -> attack.Likeness:
    """One image, with the label of the first box."""
    return attack.likeness(attack.invert(seen, [truth[0].label]), truth)


def attacked_at_once(
    seen: Mapping[str, NDArray[np.floating]], truth: list[attack.Case], evaluations: int
) -> attack.Likeness:
    """All images of a sum together, with their true labels."""
    return attack.likeness(attack.invert(seen, [each.label for each in truth], evaluations), truth)


def test_an_open_update_gives_its_image_away() -> None:
    """As an open round sends it, in 8 bits: that the attack works."""
    payload = delta.encode(change(0), seed=1)
    seen = attacked(delta.decode(payload, attack.shapes()), [case(0)])
    assert seen.true[0] > 0.85
    assert seen.true[0] > seen.control + 0.2


def test_the_masked_words_of_one_box_say_nothing_of_its_image() -> None:
    uploads, _ = masked_round()
    seen = attacked(read_alone(uploads["box-01"], layout()), [case(0)])
    assert seen.true[0] < UNREAD
    assert seen.true[0] < seen.control + 0.1


def test_read_the_same_way_before_they_were_masked_they_are_the_change() -> None:
    """So the masks hide it, not the codec."""
    read = read_alone(masking.pack(masking.as_words(words(0, layout()), 32)), layout())
    assert delta.norm(delta.subtract(read, change(0), read)) < 0.01 * delta.norm(change(0))


def test_in_the_sum_of_eight_boxes_the_same_attack_finds_none_of_their_images() -> None:
    _, total = masked_round()
    mean = addable.decode_sum(total, layout())
    expected = {name: np.mean([change(number)[name] for number in range(BOXES)], 0) for name in mean}
    assert delta.norm(delta.subtract(mean, expected, mean)) < 3 * addable.error_bound(layout(), BOXES)
    seen = attacked(mean, [case(number) for number in range(BOXES)])
    assert max(seen.true) < 0.5
    assert max(seen.true) < seen.control + 0.1


def test_a_sum_of_three_gives_all_three_images_away_to_an_attack_on_all_at_once() -> None:
    """The limit of masking alone, at the default minimum cohort, and that the attack below works."""
    few = 3
    mean = {name: np.mean([change(number)[name] for number in range(few)], 0) for name in change(0)}
    seen = attacked_at_once(mean, [case(number) for number in range(few)], 120)
    assert min(seen.true) > 0.6
    assert max(seen.true) > seen.control + 0.15


def test_with_noise_in_the_sum_neither_attack_finds_an_image() -> None:
    """Skellam noise of multiplier 1 over the eight boxes' sum, drawn in parts by each."""
    _, total = masked_round(noise=1.0)
    mean = addable.decode_sum(total, layout(noise=1.0))
    truth = [case(number) for number in range(BOXES)]
    for seen in (attacked(mean, truth), attacked_at_once(mean, truth, 40)):
        assert max(seen.true) < UNREAD
        assert max(seen.true) < seen.control + 0.1


def test_an_open_update_trained_with_privacy_does_not_give_its_image_away() -> None:
    """Noise of multiplier 1 on the one gradient, by the steps that a box with a privacy budget trains by."""
    pytest.importorskip("opacus", reason="differential privacy needs the extra `privacy`")
    seen = attacked(private_change(), [case(0)])
    assert seen.true[0] < UNREAD
    assert seen.true[0] < seen.control + 0.1


def private_change() -> Arrays:
    from models.privacy import Privacy, PrivateSteps, secret_generator

    privacy = Privacy(epsilon=1.0, clip_norm=CLIP_NORM, test_seed=1)
    network = attack.network()
    before = {name: parameter.detach().clone() for name, parameter in attack.trained().items()}
    optimizer = torch.optim.SGD(list(attack.trained().values()), lr=attack.LEARNING_RATE)
    steps = PrivateSteps(optimizer, privacy, series=1, sample_rate=1.0, noise=1.0, generator=secret_generator(privacy))
    steps.differentiate([attack.loss([case(0)])])
    optimizer.step()
    moved = {name: (parameter.detach() - before[name]).numpy() for name, parameter in attack.trained().items()}
    network.load_state_dict(before, strict=False)
    network.zero_grad()
    for parameter in network.parameters():
        parameter.grad_sample = None
    return delta.clip(moved, CLIP_NORM)[0]
