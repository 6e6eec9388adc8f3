"""What a plan is made for: one step of one phase on so many GPUs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lvtrain.classifier.classes import MAX_EXPONENT
from lvtrain.classifier.numerics import Precision as ClassifierPrecision
from lvtrain.engine.gradient_buckets import ELEMENTS
from lvtrain.methods.cost import Cost
from lvtrain.planning.device import H200, Device
from lvtrain.planning.network import Network

DEEPSPEED_BUCKET = 500_000_000  # elements of DeepSpeed's reduction bucket, its default
Precision = Literal["bfloat16", "float32"]
FLOAT32_KEEPS = 1.8  # times as much as bfloat16 autocast, whose residual stream is float32, too


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's `zero_optimization`, as far as memory and communication depend on it.

    Attributes:
        stage: 0 to 3.
        bucket: elements of a reduction bucket, `reduce_bucket_size`; None is the default of whoever reduces.
        overlap: `overlap_comm`, whether gradients travel during backward; None is the default: they do.
        offload_optimizer: the optimizer's state lies in host memory.
        offload_parameters: the parameters lie in host memory.
    """

    stage: int = 1
    bucket: int | None = None
    overlap: bool | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Zero:
        """From the JSON's section."""
        bucket = section.get("reduce_bucket_size", "auto")

        def offloads(key: str) -> bool:
            return (section.get(key) or {}).get("device", "none") != "none"

        return cls(
            stage=int(section.get("stage", 1)),
            bucket=None if bucket == "auto" else int(float(bucket)),
            overlap=None if (overlap := section.get("overlap_comm")) == "auto" else overlap,
            offload_optimizer=offloads("offload_optimizer"),
            offload_parameters=offloads("offload_param"),
        )

    @property
    def has_own_buckets(self) -> bool:
        """Whether the engine sums the gradients, not DeepSpeed."""
        return self.stage in (1, 2) and not self.offload_optimizer

    @property
    def bucket_size(self) -> int:
        """Elements of a reduction bucket."""
        return self.bucket or (ELEMENTS if self.has_own_buckets else DEEPSPEED_BUCKET)

    @property
    def overlaps(self) -> bool:
        """Whether the gradients are summed while the backward pass computes."""
        return self.stage == 3 or (self.has_own_buckets and self.overlap is not False)


@dataclass(frozen=True)
class ClassCentres:
    """The sharded classifier.

    Attributes:
        num_classes: C.
        dim: d, numbers of a class centre.
        sample_rate: r, the share of the classes that takes part in a step, the batch's own included.
        banks: names of what else is kept for every class (PCO's feature expectations), a float32 vector each.
        bank_has_negatives: the step also goes over all vectors of a bank; they get no gradient.
        optimizer: of the class centres, `adamw` or `sgd`.
        mode: of that optimizer, `dense` or `row_sparse`.
        moments_bytes: of a number of its averages, as in `lvtrain.classifier`.
        precision: of the passes, as in `lvtrain.classifier.Numerics`.
        kernel: of the passes, likewise; the one chosen, not `auto`.
        scale: s, the factor on every cosine.
        filtered: whether negatives above a threshold are dropped.
        gather_bytes: of a number in the gathered embeddings, 2 or 4.
        keep_mb: at most so much memory for exponentials that wait for backward, beyond the gradient's own.
    """

    num_classes: int
    dim: int = 512
    sample_rate: float = 1.0
    banks: tuple[str, ...] = ()
    bank_has_negatives: bool = False
    optimizer: Literal["adamw", "sgd"] = "adamw"
    mode: Literal["dense", "row_sparse"] = "dense"
    moments_bytes: int = 4
    precision: ClassifierPrecision = "half"
    kernel: Literal["torch", "triton"] = "torch"
    scale: float = 64.0
    filtered: bool = False
    gather_bytes: int = 4
    keep_mb: float = 0.0

    @property
    def operand_bytes(self) -> int:
        """Of a number in the matrix products."""
        return 2 if self.precision in ("half", "bfloat16") else 4

    @property
    def follows_maximum(self) -> bool:
        """Whether the passes subtract the running maximum, as `Classes.needs_running_max` says."""
        return self.precision == "half" or self.scale + math.log(max(self.num_classes, 2)) > MAX_EXPONENT[torch.float32]

    def local(self, ranks: int) -> int:
        """Class centres on the rank that has most."""
        return -(-self.num_classes // ranks)

    def taking_part(self, ranks: int) -> int:
        """Those of a rank in one step, the batch's own included. A batch with more classes than that is not planned for."""
        return max(1, round(self.local(ranks) * self.sample_rate))

    def kept_share(self, batch: int, ranks: int) -> float:
        """Share of the classes whose exponentials wait for backward. `batch`: images of a micro-batch on all ranks."""
        in_gradient = 4 * self.dim / (batch * self.operand_bytes)
        own = self.keep_mb * 2**20 / (batch * self.operand_bytes * self.taking_part(ranks))
        return min(1.0, in_gradient + own)


@dataclass(frozen=True)
class FrozenNetwork:
    """A network that only runs forward, such as a teacher. peak: bytes an image, as `network.forward_peak` measures."""

    name: str
    network: Network
    peak: float


@dataclass(frozen=True)
class Setup:
    """One step of one phase.

    Attributes:
        network: the trained network, measured; with the method's further parameters.
        ranks: GPUs.
        micro_batch: images of a rank that go through the network at once.
        accumulation: micro-batches of a rank in a step.
        zero: DeepSpeed's settings.
        device: the GPU and its links.
        classes: the classifier; None where the method has none.
        cost: what else the method needs.
        frozen: networks beside the trained one.
        precision: of the backbone.
        gradient_bytes: of a number in the gradients' communication.
        compiled: torch.compile.
        ema: whether the weights are averaged too.
    """

    network: Network
    ranks: int
    micro_batch: int
    accumulation: int = 1
    zero: Zero = Zero()
    device: Device = H200
    classes: ClassCentres | None = None
    cost: Cost = field(default_factory=Cost)
    frozen: tuple[FrozenNetwork, ...] = ()
    precision: Precision = "bfloat16"
    gradient_bytes: int = 4
    compiled: bool = False
    ema: bool = False
