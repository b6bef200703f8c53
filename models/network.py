"""The hybrid: convolution for texture, transformer for context, attention over slices and places, one linear head.

Reads and writes tensors; torch, so only child processes import it.
Never uses batch statistics (GroupNorm, LayerNorm only): weights of many hospitals are averaged.
Axes: B series, S slices, H W input pixels, h w places, N = B·S slices, L = h·w places, D features, A attention heads, K labels.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.errors import BundleError
from models.spec import IMPORTED, MODALITIES, InputSpec, TaskSpec

NANO, TINY, SMALL, BASE = "hybrid-nano", "hybrid-tiny", "hybrid-small", "hybrid-base"
LOOK_PARTS = 4  # mean, spread, middle, edges: numbers of a look for each frozen feature
STRIDE = 32  # the input's side is a multiple of it
FAR = 1e4  # what a padded slice or another modality's label is pushed away by


@dataclass(frozen=True)
class HybridConfig:
    """The sizes of one network."""

    label_modality: tuple[int, ...]  # for each logit, the modality whose task it belongs to
    input_px: int
    widths: tuple[int, int, int, int]  # features at 1/4 and 1/8 (convolution), 1/16 and 1/32 (transformer)
    conv_blocks: int  # in each convolution stage
    depths: tuple[int, int]  # blocks in each transformer stage; the last may be 0: there is no such stage then
    attention_heads: int = 4
    mlp_ratio: int = 3


_SIZES: dict[str, tuple[tuple[int, int, int, int], int, tuple[int, int]]] = {  # widths, conv_blocks, depths
    NANO: ((32, 64, 128, 0), 1, (3, 0)),
    TINY: ((32, 64, 128, 256), 1, (2, 2)),
    SMALL: ((48, 96, 192, 384), 1, (3, 2)),
    BASE: ((96, 192, 320, 640), 2, (4, 3)),
}


def config_of(network: str, tasks: Sequence[TaskSpec], inputs: Sequence[InputSpec]) -> HybridConfig:
    """The sizes that a manifest's `network` names, for its tasks and inputs.

    Raises BundleError for a name this software does not know, an imported network and for inputs of several sizes or a size it cannot read.
    """
    if network == IMPORTED:
        raise BundleError("an imported network has no weights to train or export", advice="train a bundle made here")
    if network not in _SIZES:
        raise BundleError(f"network {network} is not known here", advice="update the software before this bundle")
    sides = {spec.size for spec in inputs}
    if len(sides) != 1 or min(sides) % STRIDE:
        raise BundleError(f"the inputs of {network} have one side, a multiple of {STRIDE}, not {sorted(sides)}")
    widths, conv_blocks, depths = _SIZES[network]
    label_modality = tuple(MODALITIES.index(task.modality) for task in tasks for _ in task.labels)
    return HybridConfig(label_modality, min(sides), widths, conv_blocks, depths)


@dataclass(frozen=True)
class Attended:
    """What the network made of each series, before the head."""

    weighted_BSDhw: Tensor  # features of each place times the attention it gets
    weights_BSAhw: Tensor  # that attention; sums to 1 for each attention head
    pooled_BD: Tensor  # their sum: what the head decides from


class Hybrid(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """slices_BSHW, slice_mask_BS, modality_B -> logits_BK, map_BSKhw, slice_weights_BS, ood_B.

    map_BSKhw summed over slices and places, plus the head's bias, is the logit: the explanation is the decision itself.
    ood_B is the distance of what the image looks like to the nearest class mean of its modality, below 1 in distribution.
    That look comes from a copy of the convolution stages that is frozen after pretraining: features that fine-tuning may
    move have no fixed mean (after one round every image was 13 from all of them). It is pooled evenly over all places:
    the attended feature is blind to all that the attention leaves out, and on noise it hardly moved.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        first, second, features, wide = config.widths
        self.stem = _named(
            conv=nn.Conv2d(1, first // 2, 3, 2, 1),
            norm=_norm(first // 2),
            gelu=nn.GELU(),
            down=nn.Conv2d(first // 2, first, 3, 2, 1),
        )
        self.fine = nn.Sequential(*(_ConvBlock(first) for _ in range(config.conv_blocks)))
        self.shrink = _named(norm=_norm(first), gelu=nn.GELU(), down=nn.Conv2d(first, second, 3, 2, 1))
        self.middle = nn.Sequential(*(_ConvBlock(second) for _ in range(config.conv_blocks)))
        self.tokens = _named(norm=_norm(second), gelu=nn.GELU(), down=nn.Conv2d(second, features, 3, 2, 1))
        side = config.input_px // 16
        self.modality = nn.Embedding(len(MODALITIES), features)
        self.position = _Position(features, side)
        self.context = _transformer(config, features, config.depths[0])
        self.wider = _WideContext(config, features, wide) if config.depths[1] else None
        self.detail = nn.Conv2d(second, features, 1)
        self.join_norm = nn.LayerNorm(features)
        self.join = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, features))
        self.gate = nn.Conv2d(features, config.attention_heads, 1)
        self.head = nn.Linear(features, len(config.label_modality))
        initialise(self)
        self.attention_heads, self.input_px = config.attention_heads, config.input_px
        labels, look = len(config.label_modality), LOOK_PARTS * second
        self.ood_stages = copy.deepcopy(self.texture_stages())
        self.register_buffer("ood_mean_KD", torch.zeros(labels, look))
        self.register_buffer("ood_whiten_DD", torch.eye(look))
        self.register_buffer("label_modality_K", torch.tensor(config.label_modality), persistent=False)

    def forward(self, slices_BSHW: Tensor, slice_mask_BS: Tensor, modality_B: Tensor) -> tuple[Tensor, ...]:
        seen = self.attended(slices_BSHW, slice_mask_BS, modality_B)
        map_BSKhw = torch.einsum("bsdhw,kd->bskhw", seen.weighted_BSDhw, self.head.weight)
        slice_weights_BS = seen.weights_BSAhw.mean(2).sum((2, 3))
        ood_B = self.distance(self.look(slices_BSHW, slice_mask_BS), modality_B)
        return self.head(seen.pooled_BD), map_BSKhw, slice_weights_BS, ood_B

    def texture_stages(self) -> nn.Sequential:
        """The convolution stages, shared with this network: one slice in, the map at 1/8 of it out."""
        return nn.Sequential(self.stem, self.fine, self.shrink, self.middle)

    def freeze_look(self) -> None:
        """End of pretraining: what an image looks like is from now on what these stages see."""
        self.ood_stages.load_state_dict(self.texture_stages().state_dict())

    def look(self, slices_BSHW: Tensor, slice_mask_BS: Tensor) -> Tensor:
        """look_BD: of each frozen feature its mean and spread over all places, its mean in the middle and at the edges,
        averaged over the real slices. What lies at the edges tells collimation and cropping, which differ between hospitals.
        """
        batch, slices, height, width = slices_BSHW.shape
        map_NChw = self.ood_stages(slices_BSHW.reshape(batch * slices, 1, height, width))
        places_NCL = map_NChw.flatten(2)
        mean_NC = places_NCL.mean(2)
        spread_NC = ((places_NCL - mean_NC.unsqueeze(2)).square().mean(2) + 1e-6).sqrt()
        look_BSD = torch.cat([mean_NC, spread_NC, _middle(map_NChw), _edges(map_NChw)], 1).reshape(batch, slices, -1)
        real_BS1 = slice_mask_BS.to(look_BSD.dtype).unsqueeze(2)
        return (look_BSD * real_BS1).sum(1) / real_BS1.sum(1)

    def attended(self, slices_BSHW: Tensor, slice_mask_BS: Tensor, modality_B: Tensor) -> Attended:
        batch, slices, height, width = slices_BSHW.shape
        modality_BD = self.modality(modality_B)
        modality_ND = modality_BD.unsqueeze(1).expand(-1, slices, -1).reshape(batch * slices, -1)
        places_NDhw = self.places(slices_BSHW.reshape(batch * slices, 1, height, width), modality_ND)
        h, w = places_NDhw.shape[2:]
        real_BS = slice_mask_BS.to(places_NDhw.dtype)
        gate_BSAhw = self.gate(places_NDhw).reshape(batch, slices, self.attention_heads, h, w)
        gate_BAP = (gate_BSAhw + (1 - real_BS)[:, :, None, None, None] * -FAR).transpose(1, 2).flatten(2)
        weights_BSAhw = torch.softmax(gate_BAP, dim=2).reshape(batch, -1, slices, h, w).transpose(1, 2)
        places_BSAdhw = places_NDhw.reshape(batch, slices, self.attention_heads, -1, h, w)
        weighted_BSDhw = (places_BSAdhw * weights_BSAhw.unsqueeze(3)).flatten(2, 3)
        return Attended(weighted_BSDhw, weights_BSAhw, weighted_BSDhw.sum((1, 3, 4)))

    def places(self, slices_N1HW: Tensor, modality_ND: Tensor) -> Tensor:
        """One feature vector per place at 1/8 of the input: the middle stage's detail plus the transformer's context."""
        middle_NCHW = self.texture_stages()(slices_N1HW)
        tokens_NDhw = self.position(self.tokens(middle_NCHW)) + modality_ND[:, :, None, None]
        context_NDhw = _over_places(self.context, tokens_NDhw)
        if self.wider is not None:
            context_NDhw = context_NDhw + self.wider(context_NDhw)
        joined_NDHW = self.detail(middle_NCHW) + functional.interpolate(context_NDhw, scale_factor=2.0, mode="nearest")
        joined_NHWD = self.join_norm(joined_NDHW.permute(0, 2, 3, 1))
        return (joined_NHWD + self.join(joined_NHWD)).permute(0, 3, 1, 2)

    def distance(self, look_BD: Tensor, modality_B: Tensor) -> Tensor:
        """Mahalanobis distance to the nearest mean of the modality's labels, over the root of the dimension."""
        offset_BKD = (look_BD.unsqueeze(1) - self.ood_mean_KD.unsqueeze(0)) @ self.ood_whiten_DD
        distance_BK = offset_BKD.square().mean(2).sqrt()
        other_BK = (modality_B.unsqueeze(1) != self.label_modality_K.unsqueeze(0)).to(distance_BK.dtype)
        return (distance_BK + other_BK * FAR).amin(1)


class _Position(nn.Module):  # type: ignore[misc]
    """What a place adds to what is seen there; a module of its own, so that per-example gradients can be taken of it."""

    def __init__(self, features: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, features, side, side) * 0.02)

    def forward(self, x_NDhw: Tensor) -> Tensor:
        return x_NDhw + self.table


class _WideContext(nn.Module):  # type: ignore[misc]
    """The second transformer stage: a quarter of the places, more features; what it adds to the first."""

    def __init__(self, config: HybridConfig, features: int, wide: int) -> None:
        super().__init__()
        side = config.input_px // 32
        self.down = _named(norm=_norm(features), down=nn.Conv2d(features, wide, 3, 2, 1))
        self.position = _Position(wide, side)
        self.context = _transformer(config, wide, config.depths[1])
        self.back = nn.Conv2d(wide, features, 1)

    def forward(self, x_NDhw: Tensor) -> Tensor:
        wide_NDhw = _over_places(self.context, self.position(self.down(x_NDhw)))
        return functional.interpolate(self.back(wide_NDhw), scale_factor=2.0, mode="nearest")


class _ConvBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = _named(
            norm=_norm(width),
            gelu=nn.GELU(),
            conv=nn.Conv2d(width, width, 3, 1, 1),
            norm_2=_norm(width),
            gelu_2=nn.GELU(),
            conv_2=nn.Conv2d(width, width, 3, 1, 1),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.body(x_NCHW)


class _TransformerBlock(nn.Module):  # type: ignore[misc]
    """Pre-norm; attention written out, so that every opset and provider has its operators."""

    def __init__(self, features: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(features)
        self.query_key_value = nn.Linear(features, 3 * features)
        self.project = nn.Linear(features, features)
        self.mlp = _named(
            norm=nn.LayerNorm(features),
            widen=nn.Linear(features, mlp_ratio * features),
            gelu=nn.GELU(),
            narrow=nn.Linear(mlp_ratio * features, features),
        )

    def forward(self, x_NLD: Tensor) -> Tensor:
        x_NLD = x_NLD + self._attention(self.attention_norm(x_NLD))
        return x_NLD + self.mlp(x_NLD)

    def _attention(self, x_NLD: Tensor) -> Tensor:
        length, features = x_NLD.shape[1:]
        width = features // self.heads
        qkv_3NALd = self.query_key_value(x_NLD).reshape(-1, length, 3, self.heads, width).permute(2, 0, 3, 1, 4)
        query_NALd, key_NALd, value_NALd = qkv_3NALd[0], qkv_3NALd[1], qkv_3NALd[2]
        weights_NALL = torch.softmax(query_NALd @ key_NALd.transpose(2, 3) * width**-0.5, dim=3)
        mixed_NLD = (weights_NALL @ value_NALd).transpose(1, 2).reshape(-1, length, features)
        return self.project(mixed_NLD)


def _named(**layers: nn.Module) -> nn.Sequential:
    """Layers by name: a weight's name says whether it belongs to a norm (models.delta)."""
    return nn.Sequential(OrderedDict(layers))


def _transformer(config: HybridConfig, features: int, depth: int) -> nn.Sequential:
    blocks = (_TransformerBlock(features, config.attention_heads, config.mlp_ratio) for _ in range(depth))
    return nn.Sequential(*blocks)


def _over_places(context: nn.Module, x_NDhw: Tensor) -> Tensor:
    """Each place as one token."""
    features, h, w = x_NDhw.shape[1:]
    return context(x_NDhw.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(-1, features, h, w)


def _middle(map_NChw: Tensor) -> Tensor:
    """Mean over the places of the middle half of each side."""
    h, w = map_NChw.shape[2:]
    return map_NChw[:, :, h // 4 : h - h // 4, w // 4 : w - w // 4].mean((2, 3))


def _edges(map_NChw: Tensor) -> Tensor:
    """Mean over the places of the four sides; each side counts alike."""
    sides = (map_NChw[:, :, 0], map_NChw[:, :, -1], map_NChw[:, :, :, 0], map_NChw[:, :, :, -1])
    return torch.stack([side.mean(2) for side in sides]).mean(0)


def initialise(network: nn.Module) -> None:
    """Convolutions keep the variance of what passes through them (torch's default lets a third of it through), and each
    transformer block starts as the identity: an untrained attention mixes places before it knows which.

    Source: He 2015 (by the fan out where a convolution shrinks); Bachlechner 2020 (ReZero).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            shrinks = module.stride != (1, 1)
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if shrinks else "fan_in", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, _TransformerBlock):
            for layer in (module.project, module.mlp.narrow):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 8), width)
