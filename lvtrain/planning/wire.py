"""Bytes that each rank sends in one step, between nodes and within them, and the computation at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from lvtrain.planning.device import Device
from lvtrain.planning.setup import ClassCentres, Setup


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step.

    Attributes:
        sent: bytes that a rank sends (and receives), `(R - 1) / R` of the whole for a gather or scatter (a ring).
        between: of them, bytes that leave the node, where the collective runs in two levels (nodes, then inside).
        behind: the computation that runs at the same time; "" if the step waits for the transfer.
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


def transfers(setup: Setup) -> list[Transfer]:
    """All of a step; none on one rank."""
    if setup.ranks == 1:
        return []
    classes = [] if setup.classes is None else classifier_transfers(setup, setup.classes)
    return classes + backbone_transfers(setup)


def classifier_transfers(setup: Setup, classes: ClassCentres) -> list[Transfer]:
    """Embeddings to every rank, the sums of each image, and the embeddings' gradient back."""
    ranks, per_node, times = setup.ranks, setup.device.per_node, setup.accumulation
    batch = setup.micro_batch * ranks
    embeddings = float(batch * classes.dim * classes.gather_bytes)
    sums = 2.0 * batch * 4 * (5 if classes.banks else 2)  # an all-reduce is a scatter and a gather
    hides = "the class centres' gradient"
    return [
        _gather("embeddings, all-gather", embeddings, ranks, per_node, times=times),
        _gather("sums, all-reduce", sums, ranks, per_node, times=times),
        _gather("embedding gradient, reduce-scatter", embeddings, ranks, per_node, hides, times),
    ]


def backbone_transfers(setup: Setup) -> list[Transfer]:
    """Gradients, and weights in float32.

    Stage 1 sums gradients once a step, 2 and 3 at every micro-batch. Under 0, 1 and 2 the sum is an all-reduce (of which
    a rank keeps its share under 1 and 2): a scatter and a gather. 1 and 2 gather the new weights after the step, 3
    gathers them before every forward and backward. A network that is compiled whole gives all gradients at the end of its
    backward pass: nothing hides their sum. One that is compiled block by block gives them as in eager mode.
    """
    zero, ranks, per_node, accumulation = setup.zero, setup.ranks, setup.device.per_node, setup.accumulation
    size = float(setup.network.parameters)
    gradients, weights = size * setup.gradient_bytes, size * 4
    late = setup.compiled and setup.network.compiles_whole
    behind = "backward" if zero.overlaps and not late else ""
    if zero.stage < 3:
        times = accumulation if zero.stage == 2 else 1
        reduced = _gather("gradients, all-reduce", 2 * gradients, ranks, per_node, behind, times)
        return [reduced] + ([_gather("weights, all-gather", weights, ranks, per_node)] if zero.stage else [])
    return [
        _gather("weights, all-gather in forward", weights, ranks, per_node, "forward", accumulation),
        _gather("weights, all-gather in backward", weights, ranks, per_node, "backward", accumulation),
        _gather("gradients, reduce-scatter", gradients, ranks, per_node, behind, accumulation),
    ]
