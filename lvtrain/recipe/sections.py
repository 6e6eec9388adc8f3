"""The whole configuration: what a recipe may say, typed and validated. The papers' own section, `method`, is in `lvtrain.recipe.methods`;
`lvtrain.recipe.files` reads and writes recipes.

These files know nothing of torch; rooms receive plain values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from lvtrain.recipe.base import Duration, Section, in_steps_or_epochs
from lvtrain.recipe.methods import Distill, MethodSection, Supervised


class Data(Section):
    """What is trained on and how it reaches the device."""

    path: Path = Field(description="folder with dataset.json, or a subset manifest (.json)")
    num_classes: int | None = Field(None, gt=0, description="checked against the dataset; taken from it when absent")
    num_samples: int | None = Field(
        None, gt=0, description="images, checked against the dataset; lets --dry-run plan without the data"
    )
    block: int = Field(4096, gt=0, description="samples read as one run of a shard; 1 is a full shuffle")
    backend: Literal["auto", "dali", "torch"] = "auto"
    threads: int = Field(2, gt=0)
    prefetch: int = Field(2, gt=0, description="micro-batches decoded ahead")
    read_ahead: int = Field(2, gt=0, description="micro-batches read from the shards at once, ahead of those")
    cache: Path | None = Field(None, description="local folder (NVMe) for copies of shards; needs cache_bytes")
    cache_bytes: int = Field(0, ge=0, description="size bound of the cache")
    augmentation: str = Field("flip", description="name of a set in lvtrain.data.augment")
    max_bad_fraction: float = Field(
        1e-3, ge=0, le=1, description="undecodable samples tolerated before the run stops, from 1,000 samples on"
    )

    @model_validator(mode="after")
    def _cache_has_a_size(self) -> Data:
        if (self.cache is None) != (self.cache_bytes == 0):
            raise ValueError(
                "cache and cache_bytes go together: where copies of shards are kept, and how many bytes of them"
            )
        return self


class Backbone(Section):
    name: str = "vit_b"
    embedding_dim: int = Field(512, gt=0)
    image_size: int = Field(112, gt=0)
    checkpoint_blocks: Literal["none", "activation", "block"] = Field(
        "none", description="what is recomputed in backward"
    )
    checkpoint_every: int = Field(1, gt=0, description="with checkpoint_blocks=block: every n-th block")
    compile: bool = Field(False, description="torch.compile the backbone, under ZeRO 0 to 2; same to rounding")
    overrides: dict[str, Any] = Field(default_factory=dict, description="extra arguments of create_backbone")


class Margin(Section):
    name: Literal["cosface", "arcface", "combined", "adaface"] = "cosface"
    scale: float = Field(64.0, gt=0)
    m: float | None = Field(None, description="margin; the name's own default when absent")
    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    straight_through: bool = Field(False, description="arcface_torch's gradient instead of the true derivative")
    filter_threshold: float | None = Field(
        None, description="drop negatives with a higher cosine (inter-class filtering)"
    )
    warmup: Duration = Field(
        default_factory=lambda: Duration("0 steps"),
        description="the margin grows from nothing over this long; in steps or epochs",
    )

    @model_validator(mode="after")
    def _fits(self) -> Margin:
        in_steps_or_epochs(self.warmup)
        return self


class RowOptimizer(Section):
    """The optimizer of the class rows; what is absent is the backbone's."""

    name: Literal["adamw", "sgd"] = "adamw"
    mode: Literal["dense", "row_sparse"] = "dense"
    lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    momentum: float = 0.9
    moments: Literal["float32", "bfloat16"] = "float32"
    kernel: Literal["torch", "triton"] = Field("torch", description="triton: row_sparse adamw in one kernel (CUDA)")
    in_backward: bool = Field(
        False, description="apply the update chunk by chunk during backward; needs one micro-batch a step"
    )


class Classifier(Section):
    margin: Margin = Field(default_factory=Margin)
    precision: Literal["float32", "tf32", "half", "bfloat16"] = "float32"
    kernel: Literal["torch", "triton"] = Field("torch", description="triton: one kernel between the matmuls (CUDA)")
    gather: Literal["float32", "bfloat16"] = "float32"
    chunk: int | None = Field(None, gt=0, description="classes a chunk; chosen from the shapes when absent")
    keep_mb: float = Field(
        8.0,
        ge=0,
        description="memory, beyond the rows' gradient, for exponentials that forward leaves for backward: saves matmuls",
    )
    optimizer: RowOptimizer = Field(default_factory=RowOptimizer)


class PhaseEnd(Section):
    cos2: float | None = Field(None, gt=0, lt=1, description="the windowed mean of cos^2 that ends the phase (CSS)")
    at_most: Duration | None = Field(None, description="longest length, counted from the phase's start")
    until: Duration | None = Field(
        None, description="latest end, counted from the run's start; with neither: the end of the schedule"
    )


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if 0 < below < above else str(above)


def default_micro_batches(global_batch: int) -> int:
    """The fewest equal micro-batches of at most 128 images."""
    return next(
        count for count in range(1, global_batch + 1) if global_batch % count == 0 and global_batch // count <= 128
    )


class Phase(Section):
    name: str
    global_batch: int = Field(gt=0)
    micro_batches: int = Field(
        default_factory=lambda found: default_micro_batches(found.get("global_batch", 1)),
        gt=0,
        description="the global batch is cut into this many micro-batches, whatever the number of GPUs",
    )
    sample_rate: float = Field(1.0, gt=0, le=1, description="r: share of negative classes that take part in a step")
    expectation: Literal["off", "update", "frozen"] = "off"
    end: PhaseEnd = Field(default_factory=PhaseEnd)

    @field_validator("expectation", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @property
    def micro_batch(self) -> int:
        return self.global_batch // self.micro_batches

    @model_validator(mode="after")
    def _divides(self) -> Phase:
        batch, v = self.global_batch, self.micro_batches
        if batch % v:
            below, above = batch - batch % v, batch - batch % v + v
            divisors = [d for d in range(1, batch + 1) if batch % d == 0]
            fewer, more = max(d for d in divisors if d < v), min((d for d in divisors if d > v), default=batch)
            raise ValueError(
                f"global_batch {batch} is not a multiple of micro_batches {v}; take global_batch {_either(below, above)}, "
                f"or micro_batches {_either(fewer, more)} (which the number of ranks must divide)"
            )
        return self


class Optimizer(Section):
    """AdamW of the backbone."""

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    weight_decay_end: float | None = Field(
        None, ge=0, description="weight decay goes there by a cosine over schedule.total, as DINO's; absent: constant"
    )
    decay_norms: bool = Field(
        False, description="weight decay on norms, biases and position embeddings too, as arcface_torch does"
    )
    layer_decay: float | None = Field(None, gt=0, le=1, description="layer-wise learning-rate decay")
    clip: float = Field(5.0, gt=0, description="gradient norm of the backbone")
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_communication: Literal["float32", "bfloat16"] = "float32"

    def weight_decay_at(self, progress: float) -> float:
        """Weight decay where a share `progress` in [0, 1] of the schedule is behind: a half cosine (Caron et al., ICCV 2021, implementation details)."""
        first, last = self.weight_decay, self.weight_decay_end
        return first if last is None else last + (first - last) * (1.0 + math.cos(math.pi * progress)) / 2.0


class Schedule(Section):
    total: Duration
    warmup: Duration = Field(default_factory=lambda: Duration("0 steps"))
    shape: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: float = Field(1.0, gt=0)
    final: float = Field(0.0, ge=0, le=1, description="last learning rate as a share of the peak")


class Checkpoint(Section):
    every: Duration = Field(default_factory=lambda: Duration("2000 steps"))
    keep_last: int = Field(2, ge=2)
    keep_every: Duration | None = None
    resume: Literal["auto", "must", "never"] = "auto"
    background: bool = Field(True, description="write while training goes on, from a snapshot in host memory")


class InitFrom(Section):
    """`init_from: PATH` is short for `init_from: {path: PATH}`."""

    path: Path = Field(description="a run, a checkpoint or a weights file")
    classifier: Literal["load", "means", "fresh"] = Field(
        "fresh",
        description="class centres: load them (same classes), means of the pretrained embeddings, or fresh random ones",
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, (str, Path)) else value


class Evaluation(Section):
    benchmarks: dict[str, Path] = Field(default_factory=dict, description="name: path of a .bin verification set")
    every: Duration | None = None
    batch: int = Field(128, gt=0)


class Logging(Section):
    every: int = Field(10, gt=0, description="steps between lines; the loss is read back only then")
    tensorboard: bool = True


class Ema(Section):
    decay: float = Field(0.9999, gt=0, lt=1)


class Safety(Section):
    max_nonfinite: int = Field(3, gt=0, description="non-finite steps in a row that stop the run")
    rollback: bool = Field(
        False, description="go back to the last checkpoint and skip the stretch of data instead of stopping"
    )
    collective_timeout: float = Field(1800.0, gt=0, description="seconds before a hung rank is an error")


class Recipe(Section):
    name: str = Field(description="of the run and of its folder below `runs`")
    runs: Path = Path("runs")
    seed: int = 0
    deterministic: bool = True
    data: Data
    backbone: Backbone = Field(default_factory=Backbone)
    classifier: Classifier | None = Field(default_factory=Classifier)
    method: MethodSection
    phases: list[Phase] = Field(min_length=1)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    init_from: InitFrom | None = None
    ema: Ema | None = None
    evaluation: Evaluation = Field(default_factory=Evaluation)
    logging: Logging = Field(default_factory=Logging)
    safety: Safety = Field(default_factory=Safety)

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(
                "a run's name is one folder's, without '/' or a leading dot; folders above it go into `runs`"
            )
        return name

    @model_validator(mode="after")
    def _phase_names_differ(self) -> Recipe:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names must differ, got {names}")
        return self

    @property
    def distill(self) -> Distill | None:
        """The supervised method's section, if there is one."""
        return self.method.distill if isinstance(self.method, Supervised) else None

    @property
    def run_folder(self) -> Path:
        return self.runs / self.name
