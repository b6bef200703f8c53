"""What the hybrid is compared with: its two cuts at equal parameters, and MONAI's DenseNet121.

Makes torch networks with the same calls as `models.network.Hybrid`, so that the same loop trains and judges them.
Never changes the hybrid itself.
Source: DenseNet121 (Huang 2017) as in MONAI, batch normalisation included.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from models.network import Attended, Hybrid, HybridConfig, _ConvBlock, _TransformerBlock, initialise

PATCH_PX = 8


class MissingError(Exception):
    """A peer that is not installed; says what to install."""


def hybrid(config: HybridConfig) -> Hybrid:
    return Hybrid(config)


def convolution_only(config: HybridConfig) -> Hybrid:
    """Convolution blocks in place of the transformer's, of as near as many parameters as whole blocks allow."""
    network = Hybrid(config)
    network.context = _convolutions(network.context, config.widths[2])
    if network.wider is not None:
        network.wider.context = _convolutions(network.wider.context, config.widths[3])
    initialise(network)
    return network


def transformer_only(config: HybridConfig) -> Hybrid:
    """Patches in place of the convolution stages; the blocks that were saved go into the first transformer stage."""
    network = Hybrid(config)
    saved = sum(parameter.numel() for parameter in network.texture_stages().parameters())
    patches = nn.Conv2d(1, config.widths[1], PATCH_PX, PATCH_PX)
    for name in ("stem", "fine", "shrink", "middle"):
        setattr(network, name, nn.Identity())
    network.stem = patches
    block = _TransformerBlock(config.widths[2], config.attention_heads, config.mlp_ratio)
    more = round(saved / sum(parameter.numel() for parameter in block.parameters()))
    network.context = nn.Sequential(
        *network.context,
        *(_TransformerBlock(config.widths[2], config.attention_heads, config.mlp_ratio) for _ in range(more)),
    )
    initialise(network)
    return network


def densenet121(config: HybridConfig) -> Hybrid:
    """Raises MissingError where MONAI is not installed."""
    try:
        from monai.networks.nets import DenseNet121
    except ImportError as error:
        raise MissingError("MONAI is not installed: ./dev bench sets it up") from error
    return cast(Hybrid, _Plain(DenseNet121(2, 1, len(config.label_modality)), config))


NETWORKS: dict[str, Callable[[HybridConfig], Hybrid]] = {
    "hybrid": hybrid,
    "convolution only": convolution_only,
    "transformer only": transformer_only,
    "DenseNet121 (MONAI)": densenet121,
}


class _Plain(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """A classifier of single images behind the hybrid's calls; it knows neither slices nor what is strange."""

    def __init__(self, classifier: nn.Module, config: HybridConfig) -> None:
        super().__init__()
        self.features = classifier.features
        self.pool = nn.Sequential(*list(classifier.class_layers)[:-1])
        self.head = classifier.class_layers[-1]
        self.input_px = config.input_px

    def attended(self, slices_BSHW: Tensor, slice_mask_BS: Tensor, modality_B: Tensor) -> Attended:
        pooled_BD = self.pool(self.features(slices_BSHW[:, :1]))
        nothing = torch.zeros(0)
        return Attended(nothing, nothing, pooled_BD)

    def look(self, slices_BSHW: Tensor, slice_mask_BS: Tensor) -> Tensor:
        return slices_BSHW.mean((2, 3))[:, :1]

    def distance(self, look_BD: Tensor, modality_B: Tensor) -> Tensor:
        return torch.zeros(len(look_BD))


class _Convolutions(nn.Module):  # type: ignore[misc]
    """Convolution blocks over tokens that are laid out as the square they came from."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_ConvBlock(width) for _ in range(count)))

    def forward(self, x_NLD: Tensor) -> Tensor:
        count, length, features = x_NLD.shape
        side = round(length**0.5)
        x_NDhw = x_NLD.transpose(1, 2).reshape(count, features, side, side)
        return self.blocks(x_NDhw).flatten(2).transpose(1, 2)


def _convolutions(transformer: nn.Module, width: int) -> nn.Module:
    wanted = sum(parameter.numel() for parameter in transformer.parameters())
    each = sum(parameter.numel() for parameter in _ConvBlock(width).parameters())
    return _Convolutions(width, max(1, round(wanted / each)))
