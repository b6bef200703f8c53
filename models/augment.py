"""Augmentation: what differs between patients and between exposures, drawn anew for each series and step.

Reads and writes batches in memory; torch, so only child processes import it.
Never mirrors top and bottom and never bends anatomy: a radiograph that no machine makes teaches nothing.
Axes: B series, S slices, H W pixels, h w places of the lesion mask.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from models.examples import Batch


@dataclass(frozen=True)
class Augmentation:
    """Largest change of each kind; one draw holds for all slices of a series."""

    mirror: bool = False  # left and right, for half of the series
    rotate_deg: float = 0.0
    scale: float = 0.0  # share of the size
    shift: float = 0.0  # share of the side
    gamma: float = 0.0  # of its logarithm
    gain: float = 0.0
    offset: float = 0.0  # of the range [-1, 1]
    noise: float = 0.0  # standard deviation, of the range [-1, 1]
    erase: float = 0.0  # side of the square that is blanked in half of the series, share of the side


NONE = Augmentation()
SITE = Augmentation(mirror=True, shift=0.08, gain=0.05, offset=0.03)  # few examples of one scanner
RADIOGRAPH = Augmentation(
    mirror=True, rotate_deg=5.0, scale=0.08, shift=0.05, gamma=0.1, gain=0.05, offset=0.02
)  # more than this, and minutes of training end before anything is learned


def augmented(batch: Batch, by: Augmentation, generator: torch.Generator) -> Batch:
    """The batch with each series changed; lesion masks move with their slices. With NONE the batch itself."""
    if by == NONE:
        return batch
    slices_BSHW = torch.from_numpy(batch.slices_BSHW)
    affine_B23 = _affines(len(slices_BSHW), by, generator)
    moved_BSHW = _moved(slices_BSHW, affine_B23, "bilinear")
    changed_BSHW = _erased(_exposed(moved_BSHW, by, generator), by, generator)
    lesion_BShw = batch.lesion_BShw
    if lesion_BShw is not None:
        lesion_BShw = _moved(torch.from_numpy(lesion_BShw), affine_B23, "nearest").numpy()
    return replace(batch, slices_BSHW=changed_BSHW.numpy(), lesion_BShw=lesion_BShw)


def _affines(count: int, by: Augmentation, generator: torch.Generator) -> Tensor:
    """theta_B23 as torch's affine_grid takes it."""
    angle_B = _uniform(count, by.rotate_deg, generator).deg2rad()
    zoom_B = 1.0 + _uniform(count, by.scale, generator)
    side_B = 1.0 - 2.0 * (torch.rand(count, generator=generator) < 0.5).float() * by.mirror
    cos_B, sin_B = angle_B.cos() * zoom_B, angle_B.sin() * zoom_B
    x_B, y_B = (_uniform(count, 2.0 * by.shift, generator) for _ in range(2))
    return torch.stack([torch.stack([cos_B * side_B, -sin_B, x_B], 1), torch.stack([sin_B * side_B, cos_B, y_B], 1)], 1)


def _moved(images_BSHW: Tensor, affine_B23: Tensor, mode: str) -> Tensor:
    grid_BHW2 = functional.affine_grid(affine_B23, list(images_BSHW.shape), align_corners=False)
    return functional.grid_sample(images_BSHW, grid_BHW2, mode=mode, padding_mode="border", align_corners=False)


def _exposed(slices_BSHW: Tensor, by: Augmentation, generator: torch.Generator) -> Tensor:
    count = len(slices_BSHW)
    gamma_B, gain_B, offset_B = (_uniform(count, most, generator) for most in (by.gamma, by.gain, by.offset))
    unit_BSHW = ((slices_BSHW + 1.0) / 2.0).clamp(0.0, 1.0) ** _each(gamma_B.exp())
    out_BSHW = (unit_BSHW * 2.0 - 1.0) * _each(1.0 + gain_B) + _each(offset_B)
    if by.noise:
        strength_B = _uniform(count, by.noise, generator).abs()
        out_BSHW = out_BSHW + torch.randn(out_BSHW.shape, generator=generator) * _each(strength_B)
    return out_BSHW.clamp(-1.0, 1.0)


def _erased(slices_BSHW: Tensor, by: Augmentation, generator: torch.Generator) -> Tensor:
    side = int(slices_BSHW.shape[-1] * by.erase)
    if not side:
        return slices_BSHW
    out_BSHW = slices_BSHW.clone()
    for image_SHW, is_hit in zip(out_BSHW, torch.rand(len(out_BSHW), generator=generator) < 0.5, strict=True):
        if not is_hit:
            continue
        row, column = torch.randint(0, slices_BSHW.shape[-1] - side + 1, (2,), generator=generator).tolist()
        image_SHW[:, row : row + side, column : column + side] = image_SHW.mean((1, 2), keepdim=True)
    return out_BSHW


def _uniform(count: int, most: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, generator=generator) * 2.0 - 1.0) * most


def _each(value_B: Tensor) -> Tensor:
    return value_B[:, None, None, None]
