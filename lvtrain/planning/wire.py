"""Bytes on the wire: what each rank sends in one step, between nodes and within them, and what it can hide behind."""

from __future__ import annotations

from dataclasses import dataclass

from lvtrain.planning.device import Device
from lvtrain.planning.memory import ClassRows
from lvtrain.planning.network import Network


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step.

    sent: bytes a rank sends (and receives) in the usual ring or tree-free algorithms, `(R - 1) / R` of the whole for
    a gather or scatter.
    between: the share of it that must leave the node when the collective is done in two levels (nodes, then within),
    bytes a GPU.
    behind: the computation it can hide behind, or "" if the step waits for it.
    """

    name: str
    sent: float
    between: float
    behind: str = ""

    def seconds(self, device: Device) -> float:
        """The longer of the two links' times, and the start."""
        return device.latency + max(self.between / device.link, self.sent / device.node_link)


def _gather(name: str, size: float, ranks: int, per_node: int, behind: str = "", times: int = 1) -> Transfer:
    """An all-gather or a reduce-scatter of `size` bytes in all, `times` a step."""
    nodes = -(-ranks // per_node)
    in_node = min(ranks, per_node)
    # every GPU takes 1/in_node of what must enter its node, and the node spreads it inside
    between = size * (nodes - 1) / nodes / in_node
    return Transfer(name, times * size * (ranks - 1) / ranks, times * between, behind)


def classifier_transfers(
    rows: ClassRows, *, ranks: int, micro_batch: int, accumulation: int, device: Device
) -> list[Transfer]:
    """Embeddings to every rank, two sums a sample, and the embeddings' gradient back."""
    if ranks == 1:
        return []
    batch, per_node = micro_batch * ranks, device.per_node
    embeddings = float(batch * rows.dim * rows.gather_bytes)
    sums = 2.0 * batch * 4 * (2 if not rows.expectations else 5)  # an all-reduce is a scatter and a gather
    return [
        _gather("embeddings, all-gather", embeddings, ranks, per_node, times=accumulation),
        _gather("sums, all-reduce", sums, ranks, per_node, times=accumulation),
        _gather(
            "embedding gradient, reduce-scatter", embeddings, ranks, per_node, "the class rows' gradient", accumulation
        ),
    ]


def backbone_transfers(
    network: Network,
    *,
    stage: int,
    ranks: int,
    accumulation: int,
    device: Device,
    gradient_bytes: int = 4,
    weight_bytes: int = 4,
    hierarchical: bool = False,
    overlap: bool | None = None,
) -> list[Transfer]:
    """Gradients and weights under ZeRO `stage`.

    overlap: DeepSpeed's `overlap_comm`, whether gradients travel during backward; None is its default, under stage 3 only.
    Stage 1 reduces once a step, 2 and 3 at every micro-batch; 1 and 2 gather the new weights after the step; 3
    gathers weights before every forward and backward. `hierarchical` (ZeRO++ with stage 3): a second copy of the
    weights is kept in every node, so that the gather of the backward pass stays inside it; forward weights travel in
    8 bits and gradients in 4 (arXiv 2306.10209).
    """
    if ranks == 1:
        return []
    per_node, size = device.per_node, float(network.parameters)
    gradients = size * gradient_bytes
    weights = size * weight_bytes
    if stage == 0:
        return [_gather("gradients, all-reduce", 2 * gradients, ranks, per_node)]
    if stage < 3:
        times = 1 if stage == 1 else accumulation
        return [
            _gather("gradients, reduce-scatter", gradients, ranks, per_node, "backward" if overlap else "", times),
            _gather("weights, all-gather", weights, ranks, per_node),
        ]
    behind = "" if overlap is False else "backward"
    if not hierarchical:
        return [
            _gather("weights, all-gather in forward", weights, ranks, per_node, "forward", accumulation),
            _gather("weights, all-gather in backward", weights, ranks, per_node, "backward", accumulation),
            _gather("gradients, reduce-scatter", gradients, ranks, per_node, "backward", accumulation),
        ]
    in_node = min(ranks, per_node)
    inside = Transfer(
        "weights, all-gather in backward, in the node",
        accumulation * weights * (in_node - 1) / in_node,
        0.0,
        "backward",
    )
    return [
        _gather("weights in 8 bits, all-gather in forward", size, ranks, per_node, "forward", accumulation),
        inside,
        _gather("gradients in 4 bits, all-to-all", size / 2, ranks, per_node, behind, accumulation),
    ]
