"""What lvtrain asks of a network besides its forward pass: its blocks, for layer decay and recomputation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import nn

from lvtrain.backbones.compiled import RunBlocks, compiled_blocks, share_drop_paths
from lvtrain.backbones.memory import Recompute, run_blocks


def count_blocks(state: Iterable[str], pattern: str) -> int:
    """How many blocks these names show; group 1 of the pattern is a block's number.

    Raises:
        ValueError: no name begins with the pattern.
    """
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


class Backbone(nn.Module):
    """`[B, 3, image_size, image_size]` float -> `[B, embedding_dim]` float32, not normalised.

    A subclass calls this constructor, sets `dim` and `num_tokens`, and declares where its blocks are. Its forward takes
    `return_tokens=True` and then returns `(tokens [B, num_tokens, dim], embeddings)`.

    Args:
        embedding_dim: width of the embedding.
        image_size: side of the images, in pixels.
        checkpoint_blocks: what the backward pass recomputes, see `lvtrain.backbones.memory`.
        checkpoint_every: in which blocks it does so, see there.

    Attributes:
        dim: width of a token, or channels of the last feature map.
        num_tokens: patches, or positions of the last feature map.
        block_names: regular expression for the start of a parameter's name; its group 1 is the number of the block.
        first_names: beginnings of the names of what stands before the first block.
        undecayed: ends of the names of tensors without weight decay, besides biases and vectors.
        takes_any_size: whether it also takes images of other sizes than `image_size` (DINO's local views).
        compiles_whole: whether `compile` makes one graph of it, so that all its gradients come at the end.
    """

    block_names: ClassVar[str] = r"blocks\.(\d+)\."
    first_names: ClassVar[tuple[str, ...]] = ("pos_embed", "cls_token", "mask_token", "patch_embed.")
    undecayed: tuple[str, ...] = ("pos_embed", "cls_token", "mask_token")
    takes_any_size: bool = False
    compiles_whole: ClassVar[bool] = False

    dim: int
    num_tokens: int

    def __init__(
        self,
        *,
        embedding_dim: PositiveInt = 512,
        image_size: PositiveInt = 112,
        checkpoint_blocks: Recompute = "none",
        checkpoint_every: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.image_size = embedding_dim, image_size
        self.checkpoint_blocks, self.checkpoint_every = checkpoint_blocks, checkpoint_every
        self._compiled_blocks: RunBlocks | None = None

    @classmethod
    def recognise(cls, state: Mapping[str, torch.Tensor], *, heads: int | None = None) -> dict[str, Any] | None:
        """Which network of this class a state dict belongs to, from its names and shapes.

        Returns the arguments of `create_backbone` that build it, or None where the names are not this class's.

        Args:
            state: weights by name, as others saved them.
            heads: attention heads of a vision transformer that is not a published size; weights do not show them.

        Raises:
            UserError: the names are this class's, but no network of it has these shapes.
            KeyError: likewise; a tensor is missing.
            ValueError: likewise; a tensor has another number of dimensions.
            IndexError: likewise; a tensor has fewer dimensions.
        """
        return None

    def adopt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Converts weights of `init_from` to this network's names. Other tensors may remain."""
        return dict(state)

    @property
    def num_blocks(self) -> int:
        """How many blocks the parameters' names show."""
        return max((self._block(name) for name, _ in self.named_parameters()), default=0)

    def layer_of(self, name: str) -> int:
        """The layer of a parameter for layer decay: 0 before the blocks, i + 1 in block i, num_blocks + 1 behind them."""
        if block := self._block(name):
            return block
        return 0 if name.startswith(self.first_names) else self.num_blocks + 1

    def _block(self, name: str) -> int:
        match = re.match(self.block_names, name)
        return int(match[1]) + 1 if match else 0

    def recompute(self, mode: Recompute) -> None:
        """Changes what the backward pass recomputes."""
        self.checkpoint_blocks = mode

    def run_blocks(self, blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
        """`x` through the blocks; in training as `checkpoint_blocks` says, and compiled after `compile`."""
        if not self.training:
            return run_blocks(blocks, x)
        run = self._compiled_blocks or run_blocks
        return run(blocks, x, self.checkpoint_blocks, self.checkpoint_every)

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """torch.compile in place; in training block by block, where `compiles_whole` is False. Parameter names stay.

        Args:
            options: of torch.compile.
        """
        super().compile(**options)
        if not self.compiles_whole:
            share_drop_paths(self)
            self._compiled_blocks = compiled_blocks(**options)

    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(tokens [B, num_tokens, dim], embeddings [B, embedding_dim])`; tokens are row-major over the grid."""
        return self(images, return_tokens=True)

    def init_linears(self) -> None:
        """Weights of every linear layer from a truncated normal of 0.02, biases 0, in the order of the modules."""
        from timm.layers import trunc_normal_  # not above: timm imports much, and recipes are read without it

        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
