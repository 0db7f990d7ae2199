"""The parts of encoders and decoders: residual blocks, attention between cells, changes of resolution."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pixel_shuffle, pixel_unshuffle, silu

from sixfold.models.attention import full_attention
from sixfold.models.convolution import Conv2d, GroupNorm
from sixfold.models.network import Linear, xavier_uniform


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where channels change."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(groups, inputs)
        self.convolution_1 = Conv2d(inputs, outputs)
        self.norm_2 = GroupNorm(groups, outputs)
        self.convolution_2 = Conv2d(outputs, outputs)
        self.shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h w"]:
        """Apply the block."""
        hidden = self.convolution_1(silu(self.norm_1(x)))
        hidden = self.convolution_2(silu(self.norm_2(hidden)))
        kept = x if self.shortcut is None else self.shortcut(x)
        added: Tensor = kept + hidden
        return added

    def flops(self, cells: float) -> float:
        """FLOPs of one map of this many cells."""
        parts = (self.convolution_1, self.convolution_2, *([] if self.shortcut is None else [self.shortcut]))
        return sum(part.flops(cells) for part in parts)


class CellAttention(nn.Module):
    """x + attention between all cells of the normalised map, with one head as in latent diffusion."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm = GroupNorm(groups, channels)
        tag = xavier_uniform(channels, channels)
        self.query = Linear(channels, channels, tag=tag, bias=True)
        self.key = Linear(channels, channels, tag=tag, bias=True)
        self.value = Linear(channels, channels, tag=tag, bias=True)
        self.output = Linear(channels, channels, tag=tag, bias=True)

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n channels h w"]:
        """Mix cells."""
        cells = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (part(cells)[:, None] for part in (self.query, self.key, self.value))
        mixed: Tensor = self.output(full_attention(query, key, value)[:, 0])
        return x + mixed.transpose(1, 2).reshape(x.shape)

    def flops(self, cells: float) -> float:
        """FLOPs of one map of this many cells: four maps, and the two products of attention."""
        return 2.0 * cells * (4 * self.channels**2 + 2 * cells * self.channels)


class Downsample(nn.Module):
    """Half the height and width by a strided convolution, padded below and to the right alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = Conv2d(inputs, outputs, stride=2, padding=0)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h//2 w//2"]:
        """Halve."""
        halved: Tensor = self.convolution(pad(x, (0, 1, 0, 1)))
        return halved

    def flops(self, cells: float) -> tuple[float, float]:
        """FLOPs of one map of this many cells, and the cells it leaves."""
        return self.convolution.flops(cells / 4), cells / 4


class Upsample(nn.Module):
    """Twice the height and width: each cell repeated, then a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = Conv2d(inputs, outputs)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs 2*h 2*w"]:
        """Double."""
        doubled: Tensor = self.convolution(interpolate(x, scale_factor=2.0, mode="nearest"))
        return doubled

    def flops(self, cells: float) -> tuple[float, float]:
        """FLOPs of one map of this many cells, and the cells it leaves."""
        return self.convolution.flops(4 * cells), 4 * cells


class SpaceToChannel(nn.Module):
    """Half the height and width, learned as a residual to pixels moved into channels (DC-AE, arXiv 2410.10733, 3.1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.convolution = Conv2d(inputs, outputs, stride=2, padding=0)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h//2 w//2"]:
        """Halve."""
        learned: Tensor = self.convolution(pad(x, (0, 1, 0, 1)))
        return learned + average_channels(pixel_unshuffle(x, 2), self.outputs)

    def flops(self, cells: float) -> tuple[float, float]:
        """FLOPs of one map of this many cells, and the cells it leaves."""
        return self.convolution.flops(cells / 4), cells / 4


class ChannelToSpace(nn.Module):
    """Twice the height and width, learned as a residual to channels moved into pixels (DC-AE)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.convolution = Conv2d(inputs, 4 * outputs)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs 2*h 2*w"]:
        """Double."""
        learned: Tensor = self.convolution(x)
        return pixel_shuffle(learned + repeat_channels(x, 4 * self.outputs), 2)

    def flops(self, cells: float) -> tuple[float, float]:
        """FLOPs of one map of this many cells, and the cells it leaves."""
        return self.convolution.flops(cells), 4 * cells


def average_channels(x: Float[Tensor, "n c h w"], channels: int) -> Float[Tensor, "n channels h w"]:
    """Means of consecutive groups of channels: the shortcut where their number falls."""
    n, _, height, width = x.shape
    return x.reshape(n, channels, -1, height, width).mean(2)


def repeat_channels(x: Float[Tensor, "n c h w"], channels: int) -> Float[Tensor, "n channels h w"]:
    """Each channel repeated: the shortcut where their number grows."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


Resampling = Downsample | Upsample | SpaceToChannel | ChannelToSpace


class Stage(nn.Module):
    """Residual blocks at one resolution, attention after each where asked for, and a change of resolution.

    Args:
        inputs: channels in.
        outputs: channels out.
        depth: residual blocks.
        groups: of the norms.
        attention: whether attention follows each residual block.
        resample: what changes the resolution at the end, if anything.
    """

    def __init__(
        self, inputs: int, outputs: int, *, depth: int, groups: int, attention: bool, resample: Resampling | None
    ) -> None:
        super().__init__()
        self.residual = nn.ModuleList(
            ResidualBlock(inputs if index == 0 else outputs, outputs, groups) for index in range(depth)
        )
        self.attention = nn.ModuleList(CellAttention(outputs, groups) for _ in range(depth if attention else 0))
        self.resample = resample

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs rows columns"]:
        """Apply the stage."""
        for index, block in enumerate(self.residual):
            x = block(x)
            if self.attention:
                x = self.attention[index](x)
        return x if self.resample is None else self.resample(x)

    def flops(self, cells: float) -> tuple[float, float]:
        """FLOPs of one map of this many cells, and the cells it leaves."""
        total = 0.0
        for index, block in enumerate(self.residual):
            assert isinstance(block, ResidualBlock)
            total += block.flops(cells)
            if self.attention:
                attention = self.attention[index]
                assert isinstance(attention, CellAttention)
                total += attention.flops(cells)
        if self.resample is None:
            return total, cells
        changing, left = self.resample.flops(cells)
        return total + changing, left


class Middle(nn.Module):
    """Two residual blocks at the smallest resolution, with attention between them where asked for."""

    def __init__(self, channels: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.first = ResidualBlock(channels, channels, groups)
        self.attention = CellAttention(channels, groups) if attention else None
        self.second = ResidualBlock(channels, channels, groups)

    def forward(self, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n channels h w"]:
        """Apply the three."""
        x = self.first(x)
        if self.attention is not None:
            x = self.attention(x)
        mixed: Tensor = self.second(x)
        return mixed

    def flops(self, cells: float) -> float:
        """FLOPs of one map of this many cells."""
        attention = 0.0 if self.attention is None else self.attention.flops(cells)
        return self.first.flops(cells) + attention + self.second.flops(cells)
