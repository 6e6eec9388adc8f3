"""What the sections of a recipe are made of: `Section`, and lengths of training.

Durations are written "500 steps", "20 epochs" or "1e6 samples" and are turned into samples by `Duration.samples`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema


class Duration:
    """A length of training in steps, epochs or samples: `Duration("20 epochs")`."""

    def __init__(self, text: str | Duration) -> None:
        self.amount: float
        self.unit: str
        if isinstance(text, Duration):
            self.amount, self.unit = text.amount, text.unit
            return
        match = re.fullmatch(r"\s*([0-9_.]+(?:[eE]\+?[0-9]+)?)\s*(step|epoch|sample)s?\s*", str(text))
        if not match:
            raise ValueError("a duration is a number and a unit (steps, epochs or samples), like '20 epochs'")
        self.amount, self.unit = float(match[1].replace("_", "")), match[2] + "s"
        if not math.isfinite(self.amount):
            raise ValueError("a duration is finite")

    def samples(self, *, global_batch: int, samples_per_epoch: int) -> int:
        """The duration in samples, rounded up to whole steps of `global_batch`."""
        per = {"steps": global_batch, "epochs": samples_per_epoch, "samples": 1}[self.unit]
        return -(-round(self.amount * per) // global_batch) * global_batch

    def __repr__(self) -> str:
        return f"{self.amount:g} {self.unit}" if self.amount < 1e6 else f"{int(self.amount)} {self.unit}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.amount, self.unit) == (other.amount, other.unit)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(repr)
        )


def _positive(duration: Duration) -> Duration:
    if not duration.amount:
        raise ValueError("it must be longer than 0")
    return duration


PositiveDuration = Annotated[Duration, AfterValidator(_positive)]


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            "a name reaches file names and scripts: use at most 100 letters, digits, '.', '_' and '-', and begin with "
            "a letter, digit or '_'"
        )
    return name


FileName = Annotated[str, AfterValidator(_file_name)]

Rule = Literal["free", "reported", "fixed"]
REQUIRED: Any = ...


def setting(
    default: Any, description: str, *, resume: Rule | None = None, unit: str = "", because: str = "", **bounds: Any
) -> Any:
    """A field of a recipe section.

    Args:
        default: its value where the recipe says nothing; REQUIRED where it must say something. A function of the fields
            before it (a dict) computes it.
        description: one short phrase, for the reference page and for errors.
        resume: whether a later start of the same run may change it. `free`: yes. `reported`: yes, and the change is
            recorded with step and start. `fixed`: no, because it decides what is trained on or what a checkpoint holds.
            None: as the section that holds the field says; `fixed` at the top.
        unit: of the value, for the reference page.
        because: why it is fixed, for the refusal, as the end of "... is fixed for a run, because".
        bounds: what pydantic checks, such as gt=0.
    """
    extra: dict[str, Any] = {
        key: text for key, text in (("resume", resume), ("unit", unit), ("because", because)) if text
    }
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra, **bounds)
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is a union of."""
    return {kind for part in get_args(annotation) for kind in _kinds(part)} or {annotation}


class Section(BaseModel):
    """A section of a recipe.

    Attributes:
        bare: key that takes a value written in place of the section: with `path`, `init_from: PATH` is short for
            `init_from: {path: PATH}`.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    bare: ClassVar[str] = ""

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, which Python takes for 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("yes, no, on, off, true and false are not numbers")
        return value

    @model_validator(mode="before")
    @classmethod
    def _from_bare(cls, value: Any) -> Any:
        value = {cls.bare: value} if cls.bare and isinstance(value, (str, Path)) else value
        return cls.completed(value) if isinstance(value, dict) else value

    @classmethod
    def completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The keys of a recipe's section with what they imply, before they are checked."""
        return values


class NamedSection(Section):
    """A section whose other fields depend on its name, such as a method's; see `lvtrain.recipe.registry`."""

    name: str = Field(description="which one; the other keys follow from it")


def in_steps_or_epochs(warmup: Duration) -> None:
    """Refuses a warm-up in samples.

    Raises:
        ValueError: `warmup` is in samples.
    """
    if warmup.unit == "samples":
        raise ValueError("warmup is given in steps or epochs")
