"""torch.compile block by block.

A network that is compiled whole gives all its gradients at the end of its backward pass. Compiled block by block, it gives
those of a block when the backward pass leaves that block, so that their sum over the ranks can begin
(`lvtrain.engine.gradient_buckets`). Blocks of one structure also share one compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lvtrain.backbones.memory import Recompute, run_block, run_blocks

# torch runs a function eagerly after 8 graphs; a convolutional network has more shapes of blocks
GRAPHS = 64

RunBlocks = Callable[[Iterable[nn.Module], torch.Tensor, Recompute, int], torch.Tensor]


def compiled_blocks(**options: Any) -> RunBlocks:
    """`memory.run_blocks` with each block compiled by itself, for one shape of its input at a time.

    Where the rest of the network is compiled too, that is in two parts, before and behind the blocks.

    Args:
        options: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    run = torch.compile(run_block, dynamic=False, **options)

    def run_compiled(blocks: Iterable[nn.Module], x: torch.Tensor, recompute: Recompute, every: int) -> torch.Tensor:
        return run_blocks(blocks, x, recompute, every, run)

    reason = "the blocks are compiled one by one"
    apart: RunBlocks = torch.compiler.disable(run_compiled, reason=reason)
    return apart


def share_drop_paths(network: nn.Module) -> None:
    """Makes the rate of stochastic depth an input of a compiled block; as a number it would be a part of the graph."""
    from timm.layers import DropPath  # not above: timm imports much, and recipes are read without it

    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath) and child.drop_prob:
                device = next(network.parameters()).device
                setattr(module, name, _DropPath(1 - child.drop_prob).to(device).train(child.training))


class _DropPath(nn.Module):
    """timm's DropPath, except that the rate is a tensor. The draws differ."""

    keep: torch.Tensor

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(keep), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        kept = torch.rand(shape, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)
