"""The `method` section of a recipe: one model a paper, told apart by `name`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Union

from pydantic import Field, model_validator

from lvtrain.recipe.base import REQUIRED, Duration, Section, in_steps_or_epochs, setting


class Distill(Section):
    """A frozen teacher that the embeddings are drawn to: (1 - weight) * the method's loss + weight * mean (1 - cos(student, teacher))."""

    teacher: Path = setting(
        REQUIRED,
        "a run, a checkpoint, an exported folder or others' weights: the student's embedding_dim and image_size",
        resume="free",  # a checkpoint knows the teacher's weights, as it knows the data's fingerprint
    )
    weight: float = Field(
        0.99, gt=0, lt=1, description="a classification's gradient is about its scale, 64, times the cosine's"
    )


class Supervised(Section):
    """What every method with a classifier may be told."""

    distill: Distill | None = None


class Pco(Supervised):
    name: Literal["pco"] = "pco"
    expectation_init: Literal["weight", "first_feature"] = "weight"
    expectation_negatives: Literal["own", "shared"] = "own"
    m2: float = Field(0.4, description="margin on the feature expectation")
    window: int = Field(20, gt=0, description="steps over which CSS averages the batch mean of cos^2")


class SelfDistillation(Section):
    """The defaults are DINO's, the head's size LAFS's."""

    prototypes: int = Field(100_000, gt=1)
    hidden: int = Field(2048, gt=0)
    bottleneck: int = Field(256, gt=0)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)
    teacher_temperature_start: float = Field(0.04, gt=0)
    teacher_warmup_epochs: float = Field(0, ge=0)
    teacher_momentum: float = Field(0.996, gt=0, le=1, description="first value; goes to 1 by a cosine")
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    freeze_last_layer: float = Field(
        1, ge=0, description="epochs at the start in which the prototypes stay as they are"
    )


class Dino(SelfDistillation):
    name: Literal["dino"] = "dino"


class Lafs(SelfDistillation):
    """DINO on landmarks: the teacher sees all of them, the student a subset."""

    name: Literal["lafs"] = "lafs"
    landmarks: int = Field(36, gt=0, description="landmarks the student sees")
    shuffle: bool = True
    perturbation: float = Field(2.0, ge=0, description="alpha, pixels")
    landmark_weights: Path | None = Field(
        None, description="supervised Part fViT run whose landmark CNN is taken, frozen"
    )


class Finetune(Supervised):
    """Supervised training from pretrained weights (init_from), LAFS's options for the landmark CNN."""

    name: Literal["finetune"] = "finetune"
    landmarks: Literal["fixed", "trained", "anchored"] = Field("trained", description="the paper's options a, b, c")
    beta: float = Field(
        0.1, ge=0, description="anchored: weight of the distance to a frozen landmark CNN's points, pixels"
    )
    window: int = Field(20, gt=0)


class Cluster(Supervised):
    """Joint label classification and supervised contrastive clustering; the defaults are the paper's setting 6."""

    name: Literal["cluster"] = "cluster"
    guided: bool = Field(True, description="cluster-guided margins; false: ArcFace with classifier.margin.m")
    m_low: float = Field(0.4, ge=0, description="margin of the tightest cluster of the step, radians")
    m_high: float = Field(0.6, ge=0, description="margin of the loosest")
    clustering: Literal["contrastive", "triplet", "centre", "none"] = Field(
        "contrastive", description="triplet and centre loss are the paper's comparisons"
    )
    alpha: float = Field(1.0, ge=0, description="weight of the clustering loss; 0 is off")
    beta: float = Field(1.0, ge=0, description="weight of the cluster-aligning loss; 0 is off")
    temperature: Literal["concentration", "learnable"] = Field(
        "concentration", description="one per class, phi_j, or a single learnable tau0"
    )
    tau0: float = Field(0.07, gt=0, description="first value of the learnable temperature")
    mean_temperature: float | None = Field(
        None, gt=0, description="rescale the temperatures to this mean over the step's classes, as PCL does"
    )
    min_temperature: float = Field(0.05, gt=0, description="smallest temperature of a class")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the cluster centres")
    recent: int = Field(100, gt=0, description="Z: most recent features a concentration is taken over")
    smoothing: float = Field(10.0, gt=0, description="PCL's alpha in Z log(Z + alpha)")
    triplet_margin: float = Field(0.2, ge=0)
    warmup: Duration = Field(
        default_factory=lambda: Duration("1 epochs"),
        description="the bank follows the features, the losses are plain ArcFace's; in steps or epochs",
    )
    window: int = Field(20, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Cluster:
        in_steps_or_epochs(self.warmup)
        if self.m_high < self.m_low:
            raise ValueError(f"m_high {self.m_high} is below m_low {self.m_low}")
        return self


MethodSection = Annotated[Union[Pco, Cluster, Dino, Lafs, Finetune], Field(discriminator="name")]  # noqa: UP007
