"""What a round moves: heads and norms whole, any other coordinate as likely as the next, the same on both sides."""

import dataclasses
import hashlib

import numpy as np
import pytest

from models.drawn import Drawn
from models.errors import DeltaError

SEED = b"round seed"
SHAPES = {"body.weight": (20, 25), "head.bias": (3,), "norm.weight": (7,), "stem.conv.weight": (4, 5), "empty": (0,)}
DRAWN = Drawn(SHAPES, SEED, 1 / 10)


def coordinates(drawn: Drawn) -> np.ndarray:
    return np.arange(drawn.size)[drawn.places]


def test_heads_and_norms_are_whole_and_the_share_is_of_the_rest() -> None:
    masks = DRAWN.masks()
    assert DRAWN.whole == {"head.bias", "norm.weight"}
    assert masks["head.bias"].all()
    assert masks["norm.weight"].all()
    assert masks["body.weight"].sum() + masks["stem.conv.weight"].sum() == 52
    assert masks["stem.conv.weight"].sum() in (1, 2, 3)  # 20 of 520, drawn one of each run of 10
    assert DRAWN.chosen == 52 + 10 == len(set(coordinates(DRAWN).tolist())) == len(coordinates(DRAWN))


def test_places_are_those_of_the_masks_by_name_and_order() -> None:
    flat = np.concatenate([DRAWN.masks()[name].ravel() for name in sorted(SHAPES)])
    assert np.flatnonzero(flat).tolist() == sorted(coordinates(DRAWN).tolist())


def test_both_sides_draw_alike_whatever_the_order_of_their_tensors() -> None:
    other = Drawn(dict(reversed(list(SHAPES.items()))), SEED, 1 / 10)
    np.testing.assert_array_equal(coordinates(other), coordinates(DRAWN))


def test_what_is_drawn_never_changes() -> None:
    """Boxes and hub of different versions of this software and of numpy stand in one round."""
    digest = hashlib.sha256(coordinates(DRAWN).astype("<i8").tobytes()).hexdigest()
    assert digest == "3006f94a94cfb545a5d82bfa0a15df27c781f698c103001506d617cfb8ba8363"


def test_another_round_draws_others() -> None:
    other = dataclasses.replace(DRAWN, seed=b"other seed")
    assert len(set(coordinates(other).tolist()) - set(coordinates(DRAWN).tolist())) > 30


def test_a_share_of_one_is_everything_in_its_order() -> None:
    assert coordinates(Drawn(SHAPES, SEED)).tolist() == list(range(530))


@pytest.mark.parametrize("shapes", [{"head.weight": (4, 3)}, {"a.norm.bias": (5,), "head.bias": (2,)}])
def test_where_all_is_whole_a_share_leaves_nothing_out(shapes: dict[str, tuple[int, ...]]) -> None:
    drawn = Drawn(shapes, SEED, 0.01)
    assert coordinates(drawn).tolist() == list(range(drawn.size))


@pytest.mark.parametrize("share", [0.0001, 1 / 16, 0.3, 0.9])
def test_every_coordinate_is_as_likely_to_be_drawn(share: float) -> None:
    rounds, size = 400, 333
    sent = np.zeros(size + 4)
    for index in range(rounds):
        shapes = {"a": (size // 3,), "b.norm": (4,), "c": (2, size // 3)}
        drawn = Drawn(shapes, SEED + index.to_bytes(2, "little"), share)
        places = coordinates(drawn)
        assert len(set(places.tolist())) == drawn.chosen == 4 + max(1, round(share * size))
        sent[places] += 1
    norm = slice(size // 3, size // 3 + 4)
    assert (sent[norm] == rounds).all()
    others = np.delete(sent, norm)
    wanted = rounds * max(1, round(share * size)) / size
    assert np.abs(others - wanted).max() <= 5 * np.sqrt(wanted) + 2


def test_a_change_elsewhere_is_found() -> None:
    masks = DRAWN.masks()
    delta = {name: mask.astype(np.float32) for name, mask in masks.items()}
    DRAWN.check_alone(delta)
    place = tuple(np.argwhere(~masks["body.weight"])[0])
    delta["body.weight"][place] = 1e-30
    with pytest.raises(DeltaError, match=r"body\.weight moved where the round does not move it"):
        DRAWN.check_alone(delta)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"share": 0.0}, "share"),
        ({"share": 1.01}, "share"),
        ({"share": float("nan")}, "share"),
        ({"seed": b"short"}, "seed"),
        ({"shapes": {}}, "no weight"),
        ({"shapes": {"x": (0,)}}, "no weight"),
        ({"shapes": {"x": (-1, -1)}}, "no weight"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong: dict, reason: str) -> None:
    with pytest.raises(DeltaError, match=reason) as refused:
        dataclasses.replace(DRAWN, **wrong)
    assert refused.value.advice
