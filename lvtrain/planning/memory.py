"""Bytes that a rank needs, part by part."""

from __future__ import annotations

import torch

from lvtrain.classifier.numerics import chunk_size
from lvtrain.planning.network import Network
from lvtrain.planning.setup import FLOAT32_KEEPS, ClassCentres, FrozenNetwork, Precision, Setup, Zero

DEEPSPEED_PREFETCH = 50_000_000  # elements that stage 3 gathers ahead, DeepSpeed's default
ALLOWANCE = 2e9  # device context, communication library, cuBLAS workspaces, allocator's slack: a guess, not a formula
LOADED_AHEAD = 2  # micro-batches of images on the device


def bytes_by_part(setup: Setup) -> dict[str, float]:
    """Everything on one rank, by name."""
    network, cost, precision = setup.network, setup.cost, setup.precision
    parts = state_bytes(network, ranks=setup.ranks, zero=setup.zero, precision=precision)
    if setup.ema:
        parts["average of the weights"] = 4.0 * network.parameters
    parts |= activation_bytes(setup)
    for frozen in setup.frozen:
        parts |= frozen_bytes(frozen, setup.micro_batch, precision=precision)
    parts |= {name: 4.0 * network.parameters for name in cost.copies}
    parts |= {name: size * setup.micro_batch for name, size in cost.per_image.items()}
    if setup.classes is not None:
        parts |= classifier_bytes(setup.classes, ranks=setup.ranks, micro_batch=setup.micro_batch)
    parts["allowance (context, workspaces)"] = ALLOWANCE
    return parts


def state_bytes(network: Network, *, ranks: int, zero: Zero, precision: Precision = "bfloat16") -> dict[str, float]:
    """The network's float32 weights, gradients and AdamW moments, as DeepSpeed lays them out under ZeRO.

    Under stages 1 to 3 the optimizer works on a float32 copy of the rank's share of the weights. What is offloaded to
    the host is not counted.
    """
    size = float(network.parameters)
    share = size / ranks
    parts = {}
    gathered = network.largest + min(DEEPSPEED_PREFETCH, size)
    parts["weights"] = 4 * (share + gathered if zero.stage == 3 else size)
    if zero.stage == 3 and zero.offload_parameters:
        parts["weights"] -= 4 * share
    if precision == "bfloat16":
        parts["bfloat16 weight copies"] = 2 * size
    parts["gradients"] = 4 * (share if zero.stage >= 2 else size)
    parts["optimizer"] = 0.0 if zero.offload_optimizer else 12 * share if zero.stage >= 1 else 8 * size
    if zero.stage >= 1:
        parts["reduction buckets"] = 4.0 * min(zero.bucket, size)  # the engine makes none larger than the model
    return parts


def activation_bytes(setup: Setup) -> dict[str, float]:
    """What the backward pass needs of a micro-batch, and the images that wait."""
    network, cost = setup.network, setup.cost
    kept = (network.saved + network.recomputed) * (FLOAT32_KEEPS if setup.precision == "float32" else 1.0)
    image = 4.0 * 3 * network.image_size**2
    return {
        "activations": kept * setup.micro_batch * cost.views,
        "images": image * setup.micro_batch * cost.loaded * LOADED_AHEAD,
    }


def frozen_bytes(frozen: FrozenNetwork, micro_batch: int, *, precision: Precision) -> dict[str, float]:
    """Float32 weights, and what one forward pass of a micro-batch needs at its peak.

    In bfloat16 a module's weights are copied while they are used.
    """
    half = precision == "bfloat16"
    copied = 2.0 * frozen.network.largest if half else 0.0
    return {
        frozen.name: 4.0 * frozen.network.parameters,
        f"{frozen.name} activations": frozen.peak * micro_batch * (1.0 if half else FLOAT32_KEEPS) + copied,
    }


def classifier_bytes(classes: ClassCentres, *, ranks: int, micro_batch: int) -> dict[str, float]:
    """Class centres, their gradient and moments, banks, and the working buffers of the passes."""
    local, part, batch = classes.local(ranks), classes.taking_part(ranks), micro_batch * ranks
    operand = classes.operand_bytes
    chunk = chunk_size(batch, classes.dim, part, None, torch.device("cuda"))
    moments = 2 if classes.optimizer == "adamw" else 1
    embeddings = batch * classes.dim * (4 + 4 + operand)  # gathered, their gradient, the operand
    anchors = 2 if classes.bank_has_negatives else 1
    of_a_class = 4 + operand + 4 + (4 if classes.sample_rate < 1 else 0)  # unit vector, operand, gradient; gathered
    workspace = anchors * chunk * (4.0 * batch + operand * batch + of_a_class * classes.dim)
    return {
        "class centres": 4.0 * local * classes.dim,
        "class centres' gradient": 4.0 * part * classes.dim,
        "class centres' moments": float(moments * classes.moments_bytes * local * classes.dim),
        "classifier workspace": workspace + embeddings + min(classes.keep_mb * 2**20, operand * batch * part),
        **{name: 4.0 * local * classes.dim for name in classes.banks},
    }
