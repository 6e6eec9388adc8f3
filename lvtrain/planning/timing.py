"""Seconds of a step, from counted flops and bytes: a roofline with stated efficiencies, not a measurement."""

from __future__ import annotations

from lvtrain.planning.device import Device
from lvtrain.planning.network import Network
from lvtrain.planning.setup import ClassCentres, Setup

# share of the rate of one large matmul: the network's have dim 256 to 1024 and launches between them
MATMUL_EFFICIENCY = 0.75
CLASSIFIER_EFFICIENCY = 0.85  # larger matmuls
# bytes that everything besides matmuls moves (norms, casts, residual sums, activation functions, forward and backward),
# for each byte kept for the backward pass. Counted for one block: 175 bytes x dim a token in eager mode, 85 compiled,
# where 28 are kept.
TRAFFIC_EAGER, TRAFFIC_COMPILED = 6.2, 3.0
LOGIT_BYTES = 14  # read and written for each logit by two passes of matmul + fused elementwise kernels
KEPT_LOGIT_BYTES = 10  # the same where the second pass finds the exponentials of the first
ADAM_BYTES = 28  # read and written for each element by a fused AdamW


def compute_seconds(setup: Setup) -> dict[str, float]:
    """What one rank computes in one step, part by part."""
    network, device, cost = setup.network, setup.device, setup.cost
    images = setup.micro_batch * setup.accumulation
    rate, whole = device.matmul * MATMUL_EFFICIENCY, network.unrecomputed or network.saved
    elementwise = _elementwise_seconds(network, device, setup.compiled)
    again = elementwise / 3 * (1 - network.saved / whole)  # elementwise work of what is recomputed
    forward = forward_seconds(network, device, compiled=setup.compiled)
    backward = (network.train_flops - network.forward_flops) / rate + elementwise * 2 / 3 + again
    share = network.parameters / (setup.ranks if setup.zero.stage >= 1 else 1)
    seconds = {
        "forward": images * (cost.views + cost.forward_views) * forward,
        "backward": images * cost.views * backward,
        "backbone optimizer": ADAM_BYTES * share / device.bandwidth,
    }
    seconds |= {frozen.name: images * forward_seconds(frozen.network, device) for frozen in setup.frozen}
    return seconds if setup.classes is None else seconds | classifier_seconds(setup, setup.classes)


def forward_seconds(network: Network, device: Device, *, compiled: bool = False) -> float:
    """One image's forward pass."""
    elementwise = _elementwise_seconds(network, device, compiled)
    return network.forward_flops / (device.matmul * MATMUL_EFFICIENCY) + elementwise / 3


def _elementwise_seconds(network: Network, device: Device, compiled: bool) -> float:
    """One image's forward and backward pass without its matmuls, nothing recomputed."""
    whole = network.unrecomputed or network.saved
    return (TRAFFIC_COMPILED if compiled else TRAFFIC_EAGER) * whole / device.bandwidth


def classifier_seconds(setup: Setup, classes: ClassCentres) -> dict[str, float]:
    """Two passes over the classes that take part, and the optimizer of the class centres.

    The passes are four matmuls; three for classes whose exponentials are kept; two more for a bank, which has no gradient.
    """
    device, ranks, batch = setup.device, setup.ranks, setup.micro_batch * setup.ranks
    logits = float(batch) * classes.taking_part(ranks)
    bank = 1 if classes.bank_has_negatives else 0
    kept = classes.kept_share(batch, ranks)
    matmuls = 4 + 2 * bank - kept
    bytes_a_logit = LOGIT_BYTES + kept * (KEPT_LOGIT_BYTES - LOGIT_BYTES) + bank * LOGIT_BYTES / 2
    slower = 1 if classes.operand_bytes == 2 else 8  # float32 without TF32
    rate = device.matmul * CLASSIFIER_EFFICIENCY / slower
    passes = logits * (2 * classes.dim * matmuls / rate + bytes_a_logit / device.bandwidth)
    touched = classes.local(ranks) if classes.mode == "dense" else classes.taking_part(ranks)
    element = 12 + (4 if classes.optimizer == "adamw" else 2) * classes.moments_bytes
    return {
        "classifier": setup.accumulation * passes,
        "class centres' optimizer": element * touched * classes.dim / device.bandwidth,
    }
