"""Bytes a rank needs, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lvtrain.planning.network import Network

DEEPSPEED_BUCKET = 500_000_000  # elements
DEEPSPEED_PREFETCH = 50_000_000
ALLOWANCE = 2e9  # device context, communication library, cuBLAS workspaces, allocator's slack: a guess, not a formula
FLOAT32_KEEPS = 1.8  # times as much as bfloat16 autocast, whose residual stream is float32, too


@dataclass(frozen=True)
class ClassRows:
    """The sharded classifier. sample_rate: r; expectations: a second anchor per class (PCO's phases 2 and 3).

    optimizer, mode, moments, in_backward: as in `lvtrain.classifier`'s row optimizer. shared_negatives: the second
    anchor uses the first's sum over negatives, so it costs no matmul. precision: bytes of the matmuls' operands (2
    half, 4 float32). keep_mb: exponentials that forward leaves for backward beyond what the rows' gradient holds, at most.
    """

    num_classes: int
    dim: int = 512
    sample_rate: float = 1.0
    expectations: bool = False
    shared_negatives: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"
    mode: Literal["dense", "row_sparse"] = "dense"
    moments_bytes: int = 4
    in_backward: bool = False
    operand_bytes: int = 2
    gather_bytes: int = 4
    keep_mb: float = 0.0

    def local(self, ranks: int) -> int:
        """Rows of the rank that has most."""
        return -(-self.num_classes // ranks)

    def taking_part(self, ranks: int) -> int:
        """Rows of a rank in one step's softmax (the batch's own classes are among them or replace negatives)."""
        return max(1, round(self.local(ranks) * self.sample_rate))

    def kept_share(self, batch: int, ranks: int) -> float:
        """Share of the classes whose exponentials wait for backward, in a step of one micro-step."""
        in_gradient = 0.0 if self.in_backward else 4 * self.dim / (batch * self.operand_bytes)
        own = self.keep_mb * 2**20 / (batch * self.operand_bytes * self.taking_part(ranks))
        return min(1.0, in_gradient + own)


@dataclass(frozen=True)
class Teacher:
    """A frozen network that a student is distilled from. peak: bytes an image, as `network.forward_peak` measures them."""

    network: Network
    peak: float


def chunk_classes(batch: int, rows: int) -> int:
    """Classes a chunk of the classifier's passes on a GPU: about 256 MB of float32 logits."""
    return max(1, min(rows, max(2048, min(65536, (64 << 20) // max(batch, 1)) // 1024 * 1024)))


def state_bytes(
    network: Network,
    *,
    ranks: int,
    stage: int,
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    bucket: int = DEEPSPEED_BUCKET,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> dict[str, float]:
    """The backbone's float32 weights, gradients and AdamW moments under ZeRO `stage` as DeepSpeed lays them out,
    bytes on the device.

    Under stages 1 to 3 the optimizer works on a float32 copy of the rank's share of the weights.
    """
    size = float(network.parameters)
    share = size / ranks
    parts = {}
    parts["weights"] = 4 * (share + network.largest + min(DEEPSPEED_PREFETCH, size) if stage == 3 else size)
    if stage == 3 and offload_parameters:
        parts["weights"] -= 4 * share
    if precision == "bfloat16":
        parts["bfloat16 weight copies"] = 2 * size
    parts["gradients"] = 4 * (share if stage >= 2 else size)
    parts["optimizer"] = 0.0 if offload_optimizer else 12 * share if stage >= 1 else 8 * size
    if stage >= 1:
        parts["reduction buckets"] = 4.0 * min(bucket, size)  # the engine makes none larger than the model
    return parts


def classifier_bytes(rows: ClassRows, *, ranks: int, micro_batch: int) -> dict[str, float]:
    """Class centres, their gradient and moments, expectations, and the passes' working buffers, bytes on one rank."""
    local, batch = rows.local(ranks), micro_batch * ranks
    chunk = chunk_classes(batch, rows.taking_part(ranks))
    slots = 2 if rows.optimizer == "adamw" else 1
    embeddings = batch * rows.dim * (4 + 4 + rows.operand_bytes)  # gathered, their gradient, the operand
    anchors = 2 if rows.expectations and not rows.shared_negatives else 1
    of_rows = (
        4 + rows.operand_bytes + 4 + (4 if rows.sample_rate < 1 else 0)
    )  # unit rows, as operands, gradient; gathered
    parts = {
        "class rows": 4.0 * local * rows.dim,
        "class rows' gradient": 0.0 if rows.in_backward else 4.0 * rows.taking_part(ranks) * rows.dim,
        "class rows' moments": float(slots * rows.moments_bytes * local * rows.dim),
        "classifier workspace": anchors * chunk * (4.0 * batch + rows.operand_bytes * batch + of_rows * rows.dim)
        + embeddings
        + min(rows.keep_mb * 2**20, rows.operand_bytes * batch * rows.taking_part(ranks)),
    }
    if rows.expectations:
        parts["feature expectations"] = 4.0 * local * rows.dim
    return parts


def teacher_bytes(
    teacher: Teacher, micro_batch: int, *, precision: Literal["bfloat16", "float32"] = "bfloat16"
) -> dict[str, float]:
    """A frozen network's float32 weights, and what one forward pass of a micro-batch needs at its peak; in bfloat16
    each module's weights are copied while they are used."""
    half = precision == "bfloat16"
    return {
        "teacher": 4.0 * teacher.network.parameters,
        "teacher activations": teacher.peak * micro_batch * (1.0 if half else FLOAT32_KEEPS)
        + (2.0 * teacher.network.largest if half else 0.0),
    }


def activation_bytes(
    network: Network,
    micro_batch: int,
    *,
    views: float = 1.0,
    pictures: float = 1.0,
    ahead: int = 2,
    precision: Literal["bfloat16", "float32"] = "bfloat16",
) -> dict[str, float]:
    """What the backward pass needs of a micro-batch of `views` full pictures an image, and `ahead` batches of images,
    of which the loader brings `pictures` full pictures each.
    """
    kept = (network.saved + network.recomputed) * (FLOAT32_KEEPS if precision == "float32" else 1.0)
    return {
        "activations": kept * micro_batch * views,
        "images": 4.0 * 3 * network.image_size**2 * micro_batch * pictures * ahead,
    }
