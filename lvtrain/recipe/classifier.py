"""The `classifier` section of a recipe: margin, numerics, and the optimizer of the class centres.

Each margin declares its section in its file, in `lvtrain/classifier/margins`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from lvtrain.recipe.base import REQUIRED, Duration, NamedSection, Section, in_steps_or_epochs, setting
from lvtrain.recipe.registry import MARGINS, named_section

_LEARNED = "a change would make it another run"
_STATE = "the checkpoints hold the state of this optimizer"


class MarginSection(NamedSection):
    """Keys that every margin has. A margin's section adds its parameters, each with a default and a description."""

    name: str = setting(REQUIRED, "name of the margin, see lvtrain/classifier/margins", because=_LEARNED)
    scale: float = setting(64.0, "s, the factor on every cosine", because=_LEARNED, gt=0)
    filter_threshold: float | None = setting(
        None,
        "negatives with a higher cosine are left out (inter-class filtering); absent: none",
        because=_LEARNED,
        ge=-1,
        le=1,
    )
    warmup: Duration = setting(
        lambda: Duration("0 steps"),
        "time in which the margin grows from 0 to its size; in steps or epochs",
        because=_LEARNED,
    )

    @field_validator("warmup")
    @classmethod
    def _in_steps_or_epochs(cls, warmup: Duration) -> Duration:
        in_steps_or_epochs(warmup)
        return warmup


if TYPE_CHECKING:
    AnyMargin = MarginSection
else:
    AnyMargin = named_section(MARGINS, default="cosface")

# what each preset sets; everything else has the field's own default
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"precision": "half", "keep_mb": 2048.0},
}


class NumericsSection(Section):
    """Number formats and memory of the classifier. `numerics: fast` is short for `numerics: {preset: fast}`."""

    bare = "preset"

    preset: Literal["exact", "fast"] = setting(
        "exact", "exact: float32; fast: float16 matmuls on GPUs, gradient error below 0.1%", resume="free"
    )
    precision: Literal["float32", "tf32", "half", "bfloat16"] = setting(
        "float32", "number format of the matmuls, instead of the preset's", because=_LEARNED
    )
    kernel: Literal["auto", "torch", "triton"] = setting(
        "auto",
        "what computes between the matmuls; auto: triton on CUDA if its self-test passes, else torch",
        resume="reported",
    )
    keep_mb: float = setting(
        8.0,
        "extra memory to keep exp(logits) from forward to backward; if all fit, a step needs three matmuls instead of four",
        resume="reported",
        unit="MB a GPU",
        ge=0,
    )
    gather: Literal["float32", "bfloat16"] = setting(
        "float32", "number format in which embeddings and their gradients are sent between GPUs", because=_LEARNED
    )

    @classmethod
    def completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        preset = values.get("preset", "exact")
        return (PRESETS.get(preset, {}) if isinstance(preset, str) else {}) | values


class CentreOptimizerSection(Section):
    """The optimizer of the class centres. Betas, eps and momentum are the backbone's, as is every value that is not set."""

    name: Literal["adamw", "sgd"] = setting("adamw", "optimizer of the class centres", because=_STATE)
    mode: Literal["dense", "row_sparse"] = setting(
        "dense",
        "dense: momentum and decay also change class centres that are not sampled, as in arcface_torch; row_sparse: these do not change",
        because=_STATE,
    )
    lr: float | None = setting(
        None, "peak learning rate of the class centres; absent: the backbone's", resume="reported", gt=0
    )
    weight_decay: float | None = setting(
        None, "weight decay of the class centres; absent: the backbone's", because=_LEARNED, ge=0
    )
    moments: Literal["float32", "bfloat16"] = setting(
        "float32", "format of the moments; bfloat16 halves their memory, with stochastic rounding", because=_STATE
    )


class Classifier(Section):
    """The margin softmax classifier: from embedding and label to loss."""

    margin: AnyMargin = setting(
        lambda: {"name": "cosface"}, "from cosine to target logit; a name, or a section with a name", because=_LEARNED
    )
    numerics: NumericsSection = setting(
        NumericsSection, "exact, fast, or a section with a preset and what differs from it"
    )
    optimizer: CentreOptimizerSection = setting(CentreOptimizerSection, "optimizer of the class centres")
