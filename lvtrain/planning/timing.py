"""Seconds of a step, from counted flops and bytes: a roofline with stated efficiencies, not a measurement."""

from __future__ import annotations

import torch

from lvtrain.classifier.numerics import chunk_size
from lvtrain.planning.device import Device, Format
from lvtrain.planning.network import Network
from lvtrain.planning.passes import both_passes, first_pass
from lvtrain.planning.setup import FLOAT32_KEEPS, ClassCentres, Precision, Setup

# share of the rate of one large matmul: the network's have dim 256 to 1024 and launches between them
MATMUL_EFFICIENCY = 0.75
CLASSIFIER_EFFICIENCY = 0.85  # larger matmuls
# bytes that everything besides matmuls moves (norms, casts, residual sums, activation functions, forward and backward),
# for each byte kept for the backward pass. Counted for one block: 175 bytes x dim a token in eager mode, 85 compiled,
# where 28 are kept.
TRAFFIC_EAGER, TRAFFIC_COMPILED = 6.2, 3.0
ADAM_BYTES = 28  # read and written for each element by a fused AdamW


def compute_seconds(setup: Setup) -> dict[str, float]:
    """What one rank computes in one step, part by part."""
    network, device, cost = setup.network, setup.device, setup.cost
    images = setup.micro_batch * setup.accumulation
    rate, whole = device.rate(setup.precision) * MATMUL_EFFICIENCY, network.unrecomputed or network.saved
    elementwise = _elementwise_seconds(network, device, setup.precision, compiled=setup.compiled)
    again = elementwise / 3 * (1 - network.saved / whole)  # elementwise work of what is recomputed
    forward = forward_seconds(network, device, setup.precision, compiled=setup.compiled)
    backward = (network.train_flops - network.forward_flops) / rate + elementwise * 2 / 3 + again
    share = network.parameters / (setup.ranks if setup.zero.stage >= 1 else 1)
    seconds = {
        "forward": images * (cost.views + cost.forward_views) * forward,
        "backward": images * cost.views * backward,
        "backbone optimizer": ADAM_BYTES * share / device.bandwidth,
    }
    for frozen in setup.frozen:
        seconds[frozen.name] = images * forward_seconds(frozen.network, device, setup.precision)
    return seconds if setup.classes is None else seconds | classifier_seconds(setup, setup.classes)


def forward_seconds(network: Network, device: Device, precision: Precision, *, compiled: bool = False) -> float:
    """One image's forward pass."""
    elementwise = _elementwise_seconds(network, device, precision, compiled=compiled)
    return network.forward_flops / (device.rate(precision) * MATMUL_EFFICIENCY) + elementwise / 3


def _elementwise_seconds(network: Network, device: Device, precision: Precision, *, compiled: bool) -> float:
    """One image's forward and backward pass without its matmuls and without recomputation."""
    whole = (network.unrecomputed or network.saved) * (FLOAT32_KEEPS if precision == "float32" else 1.0)
    return (TRAFFIC_COMPILED if compiled else TRAFFIC_EAGER) * whole / device.bandwidth


def classifier_seconds(setup: Setup, classes: ClassCentres) -> dict[str, float]:
    """Two passes over the classes that take part, and the optimizer of the class centres.

    The passes are four matmuls; three for classes whose exponentials are kept; two more for a bank, which has no gradient.
    """
    device, ranks, batch = setup.device, setup.ranks, setup.micro_batch * setup.ranks
    part = classes.taking_part(ranks)
    chunk = chunk_size(batch, classes.dim, part, None, torch.device("cuda"))
    kept, bank = classes.kept_share(batch, ranks), 1 if classes.bank_has_negatives else 0
    numbers: Format = "bfloat16" if classes.operand_bytes == 2 else "tf32" if classes.precision == "tf32" else "float32"
    rate = device.rate(numbers) * CLASSIFIER_EFFICIENCY
    flops = 2.0 * batch * part * classes.dim * (4 + 2 * bank - kept)
    moved = both_passes(classes, kept).of(batch, part, classes.dim, chunk)
    if bank:
        moved += first_pass(classes, unit=True).of(batch, part, classes.dim, chunk)
    touched = classes.local(ranks) if classes.mode == "dense" else part
    element = 12 + (4 if classes.optimizer == "adamw" else 2) * classes.moments_bytes
    return {
        "classifier": setup.accumulation * (flops / rate + moved / device.bandwidth),
        "class centres' optimizer": element * touched * classes.dim / device.bandwidth,
    }
