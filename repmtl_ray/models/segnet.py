"""SegNet with MTAN's attention: the network of the `last10` protocol, always trained from scratch.

Owns the network. Every task has attention modules of its own on the shared features. The
representation is the attended features of all tasks, concatenated along the channels, and each head
reads its task's channels. All parameters but the heads' count as shared, as in nash-mtl.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five levels, each at half the size of the one before."""
DIVISOR = 2 ** len(WIDTHS)


def _convolution(num_inputs: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_inputs, num_outputs, 3, padding=1), nn.BatchNorm2d(num_outputs), nn.ReLU()
    )


def _convolutions(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_convolution(width, width) for _ in range(count)))


def _attention(num_inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_inputs, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.BatchNorm2d(width),
        nn.Sigmoid(),
    )


class _TaskAttention(nn.Module):
    """One task's attention over the ten levels of encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        outputs = (WIDTHS[0], *WIDTHS[:-1])  # channels that each level of the decoder returns
        self.encoder = nn.ModuleList(
            _attention(width if level == 0 else 2 * width, width)
            for level, width in enumerate(WIDTHS)
        )
        self.decoder = nn.ModuleList(
            _attention(width + out, out) for width, out in zip(WIDTHS, outputs, strict=True)
        )


@final
class SegNetMTAN(nn.Module):
    """Images [rows, 3, H, W] to [rows, tasks * 64, H, W]; H and W are multiples of 32.

    Args:
        num_tasks: number of tasks; each has ten attention modules.

    Source:
        Liu et al., End-to-End Multi-Task Learning with Attention, CVPR 2019, arXiv:1803.10704, in
        the layout of nash-mtl's NYUv2 experiment: levels 3 to 5 have two inner convolutions, the
        convolutions that carry attended features on are shared by the tasks. Initial weights are
        Xavier normal, biases zero.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        levels = range(len(WIDTHS))
        shallower = (WIDTHS[0], *WIDTHS[:-1])  # width of the level before each level
        deeper = (*WIDTHS[1:], WIDTHS[-1])  # width of the level after each level
        num_inner = [1 if level < 2 else 2 for level in levels]
        self.down = nn.ModuleList(
            _convolution(3 if level == 0 else WIDTHS[level - 1], WIDTHS[level]) for level in levels
        )
        self.down_inner = nn.ModuleList(_convolutions(WIDTHS[i], num_inner[i]) for i in levels)
        self.up = nn.ModuleList(_convolution(WIDTHS[i], shallower[i]) for i in levels)
        self.up_inner = nn.ModuleList(_convolutions(shallower[i], num_inner[i]) for i in levels)
        self.carry_down = nn.ModuleList(_convolution(WIDTHS[i], deeper[i]) for i in levels)
        self.carry_up = nn.ModuleList(
            _convolution(WIDTHS[i], WIDTHS[i] if i == levels[-1] else shallower[i]) for i in levels
        )
        self.tasks = nn.ModuleList(_TaskAttention() for _ in range(num_tasks))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """All tasks' attended features at image size."""
        outer, inner, pool_indices = [], [], []
        x = images
        for down, down_inner in zip(self.down, self.down_inner, strict=True):
            outer.append(down(x))
            inner.append(down_inner(outer[-1]))
            x, indices = functional.max_pool2d(inner[-1], 2, return_indices=True)
            pool_indices.append(indices)
        unpooled, decoded = {}, {}
        for level in reversed(range(len(WIDTHS))):
            unpooled[level] = functional.max_unpool2d(x, pool_indices[level], [2, 2])
            x = decoded[level] = self.up_inner[level](self.up[level](unpooled[level]))
        return torch.cat(
            [self._attend(task, outer, inner, unpooled, decoded) for task in self.tasks], dim=1
        )

    def _attend(
        self,
        task: nn.Module,
        outer: list[Tensor],
        inner: list[Tensor],
        unpooled: dict[int, Tensor],
        decoded: dict[int, Tensor],
    ) -> Tensor:
        """One task's features after attention at all levels, down and up again.

        Args:
            task: its attention modules.
            outer, inner: of the encoder, by level: features after the first convolution, and after
                all of them.
            unpooled, decoded: of the decoder, by level: its input and its output.
        """
        assert isinstance(task, _TaskAttention)
        features: Tensor | None = None  # of this task, from one level to the next
        for level, attention in enumerate(task.encoder):
            inputs = (
                outer[level] if features is None else torch.cat([outer[level], features], dim=1)
            )
            attended = attention(inputs) * inner[level]
            features = functional.max_pool2d(self.carry_down[level](attended), 2)
        assert features is not None
        for level in reversed(range(len(WIDTHS))):
            doubled = functional.interpolate(
                features, scale_factor=2, mode="bilinear", align_corners=True
            )
            inputs = torch.cat([unpooled[level], self.carry_up[level](doubled)], dim=1)
            features = task.decoder[level](inputs) * decoded[level]
        return features


@final
class MTANHead(nn.Module):
    """A 3x3 and a 1x1 convolution on one task's channels of the representation.

    Args:
        task_index: number of the task, from 0.
        num_outputs: of the task.
    """

    def __init__(self, task_index: int, num_outputs: int) -> None:
        super().__init__()
        width = WIDTHS[0]
        self.channels = slice(task_index * width, (task_index + 1) * width)
        self.output = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, num_outputs, 1)
        )
        initialise(self)

    def forward(self, features: Tensor) -> Tensor:
        """[rows, tasks * 64, H, W] -> [rows, num_outputs, H, W]."""
        return self.output(features[:, self.channels])


def initialise(module: nn.Module) -> None:
    """Sets the initial values of all convolutions as nash-mtl does."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_normal_(part.weight)
            assert part.bias is not None
            nn.init.zeros_(part.bias)


def check_size(image_size: tuple[int, int]) -> None:
    """Refuses a size that cannot be halved five times.

    Raises:
        ValueError: names the size and the data's settings.
    """
    if any(side % DIVISOR for side in image_size):
        raise ValueError(
            f"model.encoder 'segnet_mtan' halves images five times: {image_size[0]} x "
            f"{image_size[1]} must be multiples of {DIVISOR}; set data.height and data.width."
        )
