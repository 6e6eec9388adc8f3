"""What the backward pass recomputes instead of keeping. It saves memory, costs time, and changes no result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "activation", "block"]
Share = Annotated[float, Field(ge=0, lt=1)]

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    # ZeRO-3's linear adds its bias in place; recomputing that would add it a second time to the product that was kept
    _aten.add_.Tensor,
    _aten.bmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_attention_math.default,
}


def _keep_matmuls(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(block: nn.Module, x: torch.Tensor, recompute: Recompute = "none") -> torch.Tensor:
    """`x` through one block. Random draws inside it (drop path) are repeated exactly."""
    if recompute == "activation":
        keep_matmuls = partial(create_selective_checkpoint_contexts, _keep_matmuls, allow_cache_entry_mutation=True)
        return checkpoint(block, x, use_reentrant=False, context_fn=keep_matmuls)
    if recompute == "block":
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    recompute: Recompute = "none",
    every: int = 1,
    run: Callable[[nn.Module, torch.Tensor, Recompute], torch.Tensor] = run_block,
) -> torch.Tensor:
    """`x` through the blocks one after another.

    Args:
        blocks: modules that keep the shape of `x`, or change it.
        x: of the shape that the first block takes.
        recompute: `none` keeps what autograd keeps. `activation` keeps results of matmuls and attention, and recomputes
            norms, activation functions and residual sums. `block` keeps only the input of a block and recomputes it.
        every: with `block`, every n-th block is recomputed, and the others are kept.
        run: `run_block`, or the same compiled.
    """
    for number, block in enumerate(blocks):
        kept = recompute == "block" and number % every != 0
        x = run(block, x, "none" if kept else recompute)
    return x


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block, growing linearly from 0 at the first to `last`."""
    return [last * number / max(depth - 1, 1) for number in range(depth)]
