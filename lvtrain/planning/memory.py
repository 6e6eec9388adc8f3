"""Bytes that a rank needs, part by part: what stays between steps, and what the fullest moment of a step adds."""

from __future__ import annotations

import torch

from lvtrain.classifier.numerics import chunk_size
from lvtrain.planning.network import Network
from lvtrain.planning.setup import FLOAT32_KEEPS, ClassCentres, FrozenNetwork, Setup, Zero

DEEPSPEED_PREFETCH = 50_000_000  # elements that stage 3 gathers ahead, DeepSpeed's default
ALLOWANCE = 2e9  # device context, communication library, cuBLAS workspaces, allocator's slack: a guess, not a formula
LOADED_AHEAD = 2  # micro-batches of images on the device


def bytes_by_part(setup: Setup) -> dict[str, float]:
    """Everything on one rank at the fullest moment of a step, by name.

    `tests/test_planning_peaks.py` compares it with what a step allocates (tools/results/cuda_host.md).
    """
    states = kept_bytes(setup)
    fullest = max(moments(setup).values(), key=lambda parts: sum(parts.values()))
    return states | fullest | {"allowance (context, workspaces)": ALLOWANCE}


def kept_bytes(setup: Setup) -> dict[str, float]:
    """What stays on a rank between two steps."""
    network, cost = setup.network, setup.cost
    parts = state_bytes(network, ranks=setup.ranks, zero=setup.zero)
    if setup.ema:
        parts["average of the weights"] = 4.0 * network.parameters
    parts |= {frozen.name: 4.0 * frozen.network.parameters for frozen in setup.frozen}
    parts |= {name: 4.0 * network.parameters for name in cost.copies}
    if setup.classes is not None:
        parts |= class_centre_bytes(setup.classes, ranks=setup.ranks)
    parts["images"] = image_bytes(setup) * LOADED_AHEAD
    return parts


def moments(setup: Setup) -> dict[str, dict[str, float]]:
    """What a step adds to `kept_bytes` at each of its moments, one of which is the fullest."""
    network, cost = setup.network, setup.cost
    copies = {"bfloat16 weight copies": 2.0 * network.parameters} if setup.precision == "bfloat16" else {}
    # what is recomputed casts its weights again
    kept_copies = {} if network.recomputes else copies
    activations = activation_bytes(setup)
    outputs = {name: size * setup.micro_batch for name, size in cost.per_image.items()}
    before = gradient_bytes(network, ranks=setup.ranks, zero=setup.zero) if setup.accumulation > 1 else {}
    frozen: dict[str, float] = {}
    for each in setup.frozen:
        frozen |= frozen_bytes(each, setup.micro_batch, precision=setup.precision)
    classifier: dict[str, float] = {}
    if setup.classes is not None:
        classifier = classifier_bytes(setup.classes, ranks=setup.ranks, micro_batch=setup.micro_batch)
    recomputed = {"recomputed block": network.recomputed * setup.micro_batch}
    gradients = gradient_bytes(network, ranks=setup.ranks, zero=setup.zero)
    return {
        "forward": before | copies | activations | outputs | frozen,
        "loss": before | kept_copies | activations | outputs | frozen | classifier,
        "backward begins": before | kept_copies | activations | outputs | recomputed | bucket_bytes(setup, filled=0.0),
        "backward ends": gradients | kept_copies | bucket_bytes(setup, filled=1.0),
    }


def state_bytes(network: Network, *, ranks: int, zero: Zero) -> dict[str, float]:
    """The network's float32 weights and AdamW moments, as DeepSpeed lays them out under ZeRO.

    Under stages 1 to 3 the optimizer works on a float32 copy of the rank's share of the weights. What is offloaded to
    the host is not counted.
    """
    size = float(network.parameters)
    share = size / ranks
    gathered = network.largest + min(DEEPSPEED_PREFETCH, size)
    weights = 4 * (share + gathered if zero.stage == 3 else size)
    if zero.stage == 3 and zero.offload_parameters:
        weights -= 4 * share
    optimizer = 0.0 if zero.offload_optimizer else 12 * share if zero.stage >= 1 else 8 * size
    return {"weights": weights, "optimizer": optimizer}


def gradient_bytes(network: Network, *, ranks: int, zero: Zero) -> dict[str, float]:
    """The gradients that wait for the step: all on every rank under stages 0 and 1, the rank's share under 2 and 3."""
    return {"gradients": 4.0 * network.parameters / (ranks if zero.stage >= 2 else 1)}


def bucket_bytes(setup: Setup, *, filled: float) -> dict[str, float]:
    """Buffers in which gradients are summed over the ranks, `filled` of which are in use.

    Under stages 1 and 2 a gradient moves into its bucket (`lvtrain.engine.gradient_buckets`), so that only one bucket
    comes on top of stage 1's gradients. DeepSpeed's own buckets, of stage 3 and with an offloaded optimizer, are allocated
    whole. Stage 0 copies all gradients.
    """
    size, zero, buckets = float(setup.network.parameters), setup.zero, "reduction buckets"
    if zero.stage == 0:
        return {buckets: 4 * size * filled}
    if not zero.has_own_buckets:
        return {buckets: 4 * min(zero.bucket_size, size)}
    if setup.ranks == 1:
        return {}
    one = min(max(zero.bucket_size, setup.network.largest), size)
    return {buckets: 4 * max(one, size * filled if zero.stage == 2 else 0.0)}


def activation_bytes(setup: Setup) -> dict[str, float]:
    """What the backward pass needs of a micro-batch."""
    factor = FLOAT32_KEEPS if setup.precision == "float32" else 1.0
    return {"activations": setup.network.saved * factor * setup.micro_batch * setup.cost.views}


def image_bytes(setup: Setup) -> float:
    """A micro-batch of images on the device, float32."""
    return 4.0 * 3 * setup.network.image_size**2 * setup.micro_batch * setup.cost.loaded


def frozen_bytes(frozen: FrozenNetwork, micro_batch: int, *, precision: str) -> dict[str, float]:
    """What one forward pass of a micro-batch needs at its peak. In bfloat16 a module's weights are copied while used."""
    half = precision == "bfloat16"
    copied = 2.0 * frozen.network.largest if half else 0.0
    return {f"{frozen.name} activations": frozen.peak * micro_batch * (1.0 if half else FLOAT32_KEEPS) + copied}


def class_centre_bytes(classes: ClassCentres, *, ranks: int) -> dict[str, float]:
    """Class centres, their gradient and moments, and banks."""
    local, part = classes.local(ranks), classes.taking_part(ranks)
    moments = 2 if classes.optimizer == "adamw" else 1
    return {
        "class centres": 4.0 * local * classes.dim,
        "class centres' gradient": 4.0 * part * classes.dim,
        "class centres' moments": float(moments * classes.moments_bytes * local * classes.dim),
        **{name: 4.0 * local * classes.dim for name in classes.banks},
    }


def classifier_bytes(classes: ClassCentres, *, ranks: int, micro_batch: int) -> dict[str, float]:
    """Working buffers of the first pass of the last anchor, and what the pass of the class centres keeps for backward."""
    part, batch, operand = classes.taking_part(ranks), micro_batch * ranks, classes.operand_bytes
    chunk = chunk_size(batch, classes.dim, part, None, torch.device("cuda"))
    anchors, passes = 1 + len(classes.banks), 2 if classes.bank_has_negatives else 1
    # a chunk: logits, exponentials as the matmul takes them; unit vectors, as the matmul takes them, and gathered ones
    of_a_class = 4 + operand + (4 if classes.sample_rate < 1 else 0)
    chunks = chunk * ((4.0 + operand) * batch + of_a_class * classes.dim)
    # gathered embeddings and as the matmul takes them, each anchor's targets, each pass's gradient, and one more product
    embeddings = batch * classes.dim * (4.0 + operand + 4 * anchors + 4 * passes + 4)
    kept = min(classes.keep_mb * 2**20, float(operand * batch * part))
    return {"classifier workspace": chunks + embeddings, "exponentials kept for backward": kept}
