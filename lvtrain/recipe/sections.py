"""The sections of a recipe: every key with its default, unit, meaning, bounds, and whether a resume may change it.

The sections of methods, margins and optimizers are declared in their files; `lvtrain.recipe.files` reads and writes
recipes, and `REFERENCE.md` is generated from these fields (`python tools/recipe_reference.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, SerializeAsAny, ValidationInfo, WrapValidator, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lvtrain.errors import UserError
from lvtrain.recipe import arcface_torch
from lvtrain.recipe.base import REQUIRED, Duration, FileName, NamedSection, PositiveDuration, Section, setting
from lvtrain.recipe.classifier import Classifier
from lvtrain.recipe.optimizer import AnyOptimizer
from lvtrain.recipe.registry import AUGMENTATIONS, METHODS, SectionByName, named_section
from lvtrain.recipe.trackers import AnyTracker, TrackerSection

if TYPE_CHECKING:
    MethodSection = NamedSection
else:
    MethodSection = named_section(METHODS)

IMAGES = "it decides which images a step trains on, and how they are augmented"
NETWORK = "the checkpoints hold the state of this network"
LOSS = "a change would make it another run"


def _augmentation(name: str) -> str:
    try:
        AUGMENTATIONS.get(name)
    except UserError as error:
        raise PydanticCustomError("unknown_name", "{line}", {"line": str(error)}) from error
    return name


Augmentation = Annotated[str, AfterValidator(_augmentation)]


class Data(Section):
    """The dataset and the way from its files to the GPU."""

    path: Path = setting(REQUIRED, "folder with dataset.json, or a subset manifest (.json)", resume="free")
    num_classes: int | None = setting(
        None,
        "identities; checked against the dataset. Lets --dry-run plan without the data",
        resume="free",
        gt=0,
        lt=2**32,  # a label is 32 bits in a dataset's index
    )
    num_samples: int | None = setting(
        None, "images; checked against the dataset. Lets --dry-run plan without the data", resume="free", gt=0
    )
    block: int = setting(
        4096, "neighbouring images that are read together; 1 is a full shuffle", unit="images", because=IMAGES, gt=0
    )
    backend: Literal["auto", "dali", "torch"] = setting(
        "auto", "decoder; auto: DALI where it is installed", because="decoders differ in the last bits of a pixel"
    )
    threads: int = setting(2, "threads that read and decode", unit="threads a rank", resume="free", gt=0, le=1024)
    cache: Path | None = setting(None, "local folder (NVMe) for copies of shards; needs cache_bytes", resume="free")
    cache_bytes: int = setting(0, "largest size of the cache", unit="bytes", resume="free", ge=0)
    augmentation: Augmentation = setting("flip", "name of a set in lvtrain/data/augment/sets.py", because=IMAGES)
    max_bad_fraction: float = setting(
        1e-3,
        "largest share of images that cannot be decoded; above it training stops, from 1,000 images on",
        resume="free",
        ge=0,
        le=1,
    )

    @model_validator(mode="after")
    def _cache_has_a_size(self) -> Data:
        if (self.cache is None) != (self.cache_bytes == 0):
            raise ValueError(
                "cache and cache_bytes go together: where copies of shards are kept, and how many bytes of them"
            )
        return self


_LARGEST_SIZE = 1_048_576


class Backbone(Section):
    """`backbone: NAME` is short for `backbone: {name: NAME}`."""

    bare = "name"

    name: str = setting("vit_b", "name of the network, see lvtrain/backbones", because=NETWORK)
    embedding_dim: int = setting(512, "length of the embedding", unit="numbers", because=NETWORK, gt=0, le=65_536)
    image_size: int = setting(112, "side of the square input", unit="pixels", because=NETWORK, gt=0, le=4_096)
    checkpoint_blocks: Literal["none", "activation", "block"] = setting(
        "none",
        "what the backward pass recomputes to save memory: nothing, norms and activation functions, or whole blocks",
        resume="reported",
    )
    compile: bool = setting(
        False, "torch.compile the backbone, under ZeRO 0 to 2; same result to rounding", resume="reported"
    )
    overrides: dict[str, Any] = setting(dict, "further arguments of create_backbone, such as depth", because=NETWORK)

    @field_validator("name")
    @classmethod
    def _as_here(cls, name: str) -> str:
        return arcface_torch.network(name)

    @field_validator("overrides")
    @classmethod
    def _has_sizes_of_a_network(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for key, value in overrides.items():
            if isinstance(value, int) and abs(value) > _LARGEST_SIZE:
                raise ValueError(f"{key} is {value}; {_LARGEST_SIZE:,} is the largest size of a network")
        return overrides


class PhaseEnd(Section):
    """What ends a phase: a cosine that is reached (CSS), or a length."""

    cos2: float | None = setting(
        None,
        "the phase ends when the mean cos^2 of images to their own class centres reaches this (delta; CSS, cosine stage scheduler)",
        gt=0,
        lt=1,
    )
    at_most: PositiveDuration | None = setting(None, "latest end, from the start of the phase")
    until: PositiveDuration | None = setting(
        None, "latest end, from the start of the run; without at_most and until: the end of the schedule"
    )


def _either(below: int, above: int) -> str:
    return f"{below} or {above}" if 0 < below < above else str(above)


def default_micro_batches(global_batch: int) -> int:
    """The fewest equal micro-batches of at most 128 images."""
    return next(
        count for count in range(1, global_batch + 1) if global_batch % count == 0 and global_batch // count <= 128
    )


class Phase(Section):
    """What every phase has. A method may add keys: its `phase` is then a subclass."""

    name: FileName = setting(REQUIRED, "name of the phase", because="checkpoints and --phase name it")
    global_batch: int = setting(REQUIRED, "images a step, over all GPUs", unit="images", because=IMAGES, gt=0)
    micro_batches: int = setting(
        lambda before: default_micro_batches(before.get("global_batch", 1)),
        "the global batch is cut into this many micro-batches, on any number of GPUs; absent: at most 128 images each, or "
        "on a GPU as many as fit by the plan; decided at the first start",
        unit="micro-batches",
        because="batch norm and sampling work on micro-batches",
        gt=0,
    )
    sample_rate: float = setting(
        1.0, "r: share of the classes that take part in a step, including those of the batch", because=LOSS, gt=0, le=1
    )
    end: PhaseEnd = setting(PhaseEnd, "when the phase ends", resume="reported")

    @property
    def micro_batch(self) -> int:
        return self.global_batch // self.micro_batches

    @model_validator(mode="after")
    def _divides(self) -> Phase:
        batch, count = self.global_batch, self.micro_batches
        if batch % count:
            below, above = batch - batch % count, batch - batch % count + count
            divisors = [d for d in range(1, batch + 1) if batch % d == 0]
            fewer, more = max(d for d in divisors if d < count), min((d for d in divisors if d > count), default=batch)
            raise ValueError(
                f"global_batch {batch} is not a multiple of micro_batches {count}; take global_batch {_either(below, above)}, "
                f"or micro_batches {_either(fewer, more)} (which the number of ranks must divide)"
            )
        return self


class PhaseOfMethod(SectionByName):
    """The mark on `phases`: the method decides which keys a phase has."""

    has_own_name = False

    def of(self, value: Any, recipe: Any) -> type[Section] | None:
        method = recipe.get("method") if isinstance(recipe, dict) else None
        section = super().of(method, recipe)
        return Phase if section is None else self.registry.get(_name_of(method)).phase

    def sections(self) -> dict[str, type[Section]]:
        return {name: method.phase for name, method in self.registry.entries().items()}


def _name_of(section: Any) -> str:
    return section["name"] if isinstance(section, dict) else section


def _validate_phase(value: Any, handler: Any, info: ValidationInfo) -> Any:
    method = info.data.get("method")
    if method is None:  # refused already, and without it the keys of a phase are unknown
        return value
    phase: type[Phase] = METHODS.get(method.name).phase
    return phase.model_validate(value.model_dump() if isinstance(value, Phase) else value)


if TYPE_CHECKING:
    AnyPhase = Phase
else:
    AnyPhase = Annotated[SerializeAsAny[Phase], WrapValidator(_validate_phase), PhaseOfMethod(METHODS)]


class Schedule(Section):
    """Length of the run, and the learning rate over it."""

    total: PositiveDuration = setting(REQUIRED, "length of the run")
    warmup: Duration = setting(lambda: Duration("0 steps"), "the learning rate rises from 0 over this long")
    shape: Literal["polynomial", "quadratic", "cosine", "constant"] = setting(
        "polynomial",
        "how the learning rate falls after the warm-up; polynomial: in a straight line; quadratic: with its square, as in "
        "arcface_torch of 2022",
    )
    final: float = setting(0.0, "learning rate at the end, as a share of the peak", ge=0, le=1)

    @model_validator(mode="after")
    def _warmup_fits(self) -> Schedule:
        if self.warmup.unit == self.total.unit and self.warmup.amount > self.total.amount:
            raise ValueError(f"warmup {self.warmup} is longer than total {self.total}; shorten it, too")
        return self


class Checkpoint(Section):
    """When checkpoints are written, and which are kept."""

    every: PositiveDuration = setting(lambda: Duration("2000 steps"), "time between checkpoints")
    keep_last: int = setting(
        2,
        "number of newest checkpoints that are kept; those at the ends of phases are kept, too",
        unit="checkpoints",
        ge=2,
    )
    keep_every: PositiveDuration | None = setting(None, "time between checkpoints that are never deleted")
    resume: Literal["auto", "must", "never"] = setting(
        "auto",
        "auto: resume if there is a checkpoint; must: an error if there is none; never: an error if there is a run",
    )


class InitFrom(Section):
    """`init_from: PATH` is short for `init_from: {path: PATH}`."""

    bare = "path"

    path: Path = setting(REQUIRED, "a run, a checkpoint or a weights file")
    classifier: Literal["load", "means", "fresh"] = setting(
        "fresh",
        "class centres at the start: loaded (same classes), means of the pretrained embeddings, or random",
    )
    head_only: PositiveDuration | None = setting(
        None,
        "time at the start in which only the class centres are trained; the backbone and its BatchNorm statistics do not change",
        because="it decides when the backbone is trained",
    )
    licence: str | None = setting(
        None,
        "licence of the data that these weights learned from, if their file does not state it; the run inherits it",
        because="the weights inherit this licence",
    )
    input: str = setting(
        "", 'how weights of another project take images, if their file does not say so: "bgr", "bgr 0..255"'
    )


class Evaluation(Section):
    """Benchmarks during training."""

    benchmarks: dict[FileName, Path | dict[str, Any]] = setting(
        dict, "by name: a path (.bin file, IJB folder, labelled set), or {protocol, path, and the protocol's options}"
    )
    every: PositiveDuration | None = setting(
        None, "time between evaluations; each phase's end and the start of training are evaluated, too"
    )


class Logging(Section):
    """What is logged, how often, and where to."""

    every: int = setting(10, "steps between log lines; the loss is read from the GPU only then", unit="steps", gt=0)
    trackers: list[AnyTracker] = setting(
        lambda: [TrackerSection(name="tensorboard")], "where metrics go besides metrics.jsonl, by name"
    )


class Ema(Section):
    """A moving average of the weights, which is evaluated and exported."""

    decay: float = setting(0.9999, "decay of the averaged weights in each step", because=LOSS, gt=0, lt=1)


class Safety(Section):
    """What happens when a step or a rank fails."""

    rollback: bool = setting(
        False,
        "after 3 non-finite steps in a row, return to the last checkpoint and skip the images since then, instead of stopping",
    )
    collective_timeout: float = setting(
        1800.0, "if a rank does not answer for this time, the run ends with an error", unit="seconds", gt=0
    )


class Recipe(Section):
    """All that decides a run, besides the DeepSpeed JSON."""

    name: FileName = setting(
        REQUIRED, "name of the run, and of its folder in runs", because="the run folder has this name"
    )
    runs: Path = setting(Path("runs"), "folder of all run folders", resume="free")
    seed: int = setting(0, "seed of all random draws", because=IMAGES)
    deterministic: bool = setting(
        True, "deterministic kernels: a resume gives the same bits; false is faster on GPUs", resume="reported"
    )
    data: Data = setting(REQUIRED, "what is trained on and how it reaches the GPU")
    backbone: Backbone = setting(Backbone, "image to embedding")
    classifier: Classifier | None = setting(Classifier, "embedding and label to loss; null for self-supervision")
    method: MethodSection = setting(
        REQUIRED, "what is trained, after which paper; a name, or a section with a name", because=LOSS
    )
    phases: list[AnyPhase] = setting(REQUIRED, "phases of training, in order", min_length=1)
    optimizer: AnyOptimizer = setting(dict, "optimizer of the backbone; a name, or a section with a name")
    schedule: Schedule = setting(REQUIRED, "length of the run and learning rate over it", resume="reported")
    checkpoint: Checkpoint = setting(Checkpoint, "when checkpoints are written and kept", resume="free")
    init_from: InitFrom | None = setting(
        None, "weights to start from", because="the run has already started from other weights"
    )
    ema: Ema | None = setting(
        None, "exponential moving average of the weights, which is then evaluated", because=NETWORK
    )
    evaluation: Evaluation = setting(Evaluation, "verification during training", resume="free")
    logging: Logging = setting(Logging, "what is written down while training", resume="free")
    safety: Safety = setting(Safety, "what stops a run", resume="free")

    @model_validator(mode="after")
    def _phase_names_differ(self) -> Recipe:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phase names must differ, got {names}")
        return self

    @property
    def open_phases(self) -> list[Phase]:
        """The phases whose number of micro-batches the recipe leaves open; they have the default."""
        return [phase for phase in self.phases if "micro_batches" not in phase.model_fields_set]

    def with_micro_batches(self, counts: dict[str, int]) -> Recipe:
        """The recipe with these numbers of micro-batches, by phase; it then says them, and other phases stay."""
        phases = [
            phase.model_copy(update={"micro_batches": counts[phase.name]}) if phase.name in counts else phase
            for phase in self.phases
        ]
        return self.model_copy(update={"phases": phases})

    @property
    def run_folder(self) -> Path:
        return self.runs / self.name
