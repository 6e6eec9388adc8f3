"""Seconds a step, from counted flops and bytes: a roofline with the efficiencies stated, not a promise."""

from __future__ import annotations

from lvtrain.planning.device import Device
from lvtrain.planning.memory import ClassRows
from lvtrain.planning.network import Network

MATMUL_EFFICIENCY = (
    0.75  # of the rate of one large matmul, at these shapes (dim 256 to 1024) with launches between them
)
CLASSIFIER_EFFICIENCY = 0.85  # longer matmuls
# bytes moved by everything that is not a matmul, for each byte kept for backward: norms, casts, residual sums,
# activation functions, forward and backward. Counted for one block: 175 bytes x dim a token in eager mode, 85
# compiled, at 28 kept.
TRAFFIC_EAGER, TRAFFIC_COMPILED = 6.2, 3.0
LOGIT_BYTES = 14  # read and written for each logit by two passes of matmul + fused elementwise kernels
KEPT_LOGIT_BYTES = 10  # the same where the second pass finds the exponentials of the first
ADAM_BYTES = 28  # read and written for each element by a fused AdamW


def compute_seconds(
    network: Network,
    device: Device,
    *,
    micro_batch: int,
    accumulation: int,
    ranks: int,
    stage: int,
    compiled: bool = False,
    views: float = 1.0,
    teacher_views: float = 0.0,
) -> dict[str, float]:
    """The backbone's forward, backward and optimizer for one step of one rank."""
    images = micro_batch * accumulation
    rate, whole = device.matmul * MATMUL_EFFICIENCY, network.unrecomputed or network.saved
    elementwise = _elementwise_seconds(network, device, compiled)
    again = elementwise / 3 * (1 - network.saved / whole)  # elementwise work of what is recomputed
    forward = forward_seconds(network, device, compiled=compiled)
    backward = (network.train_flops - network.forward_flops) / rate + elementwise * 2 / 3 + again
    share = network.parameters / (ranks if stage >= 1 else 1)
    return {
        "forward": images * (views + teacher_views) * forward,
        "backward": images * views * backward,
        "backbone optimizer": ADAM_BYTES * share / device.bandwidth,
    }


def forward_seconds(network: Network, device: Device, *, compiled: bool = False) -> float:
    """One image's forward pass."""
    elementwise = _elementwise_seconds(network, device, compiled)
    return network.forward_flops / (device.matmul * MATMUL_EFFICIENCY) + elementwise / 3


def _elementwise_seconds(network: Network, device: Device, compiled: bool) -> float:
    """What is no matmul in one image's forward and backward pass, nothing recomputed."""
    whole = network.unrecomputed or network.saved
    return (TRAFFIC_COMPILED if compiled else TRAFFIC_EAGER) * whole / device.bandwidth


def classifier_seconds(
    rows: ClassRows, device: Device, *, micro_batch: int, accumulation: int, ranks: int
) -> dict[str, float]:
    """Two passes over the classes that take part (four matmuls, three for the classes whose exponentials are kept; two more
    for expectations of their own, which have no gradient) and the row optimizer.
    """
    logits = float(micro_batch * ranks) * rows.taking_part(ranks)
    own = 1 if rows.expectations and not rows.shared_negatives else 0
    kept = rows.kept_share(micro_batch * ranks, ranks)
    matmuls = 4 + 2 * own - kept
    bytes_a_logit = LOGIT_BYTES + kept * (KEPT_LOGIT_BYTES - LOGIT_BYTES) + own * LOGIT_BYTES / 2
    rate = (
        device.matmul * CLASSIFIER_EFFICIENCY / (1 if rows.operand_bytes == 2 else 8)
    )  # float32 without TF32 is far slower
    passes = logits * (2 * rows.dim * matmuls / rate + bytes_a_logit / device.bandwidth)
    touched = rows.local(ranks) if rows.mode == "dense" else rows.taking_part(ranks)
    element = 12 + 4 * rows.moments_bytes if rows.optimizer == "adamw" else 12 + 2 * rows.moments_bytes
    return {
        "classifier": accumulation * passes,
        "row optimizer": element * touched * rows.dim / device.bandwidth,
    }
