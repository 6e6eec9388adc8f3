"""The keys of a study file, and its reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from lvtrain.errors import UserError
from lvtrain.recipe import files as recipes
from lvtrain.recipe.base import Section


class Generated(Section):
    """Faces that `tools/synth_faces.py` generates if they do not exist."""

    path: Path
    identities: int = Field(gt=1)
    images: int = Field(gt=0, description="per identity")
    heldout: int = Field(gt=1, description="identities that are not trained on")
    pairs: int = Field(gt=0)
    difficulty: str = "normal"
    seed: int = 0


class Subsets(Section):
    """Few-shot subsets of one dataset: every setting is trained on each of them."""

    dataset: Path
    fractions: list[float] = Field(min_length=1, description="shares of the identities")
    shots: list[int | None] = Field(min_length=1, description="images per identity; null is all")


class Manifest(Section):
    """A subset that settings name in `data.path`; written if it does not exist."""

    dataset: Path
    fraction: float = Field(1.0, gt=0, le=1, description="share of the identities")
    shots: int | None = Field(None, description="images per identity; null is all")
    seed: int = 0


class Study(Section):
    recipe: Path = Field(description="of every setting that does not name its own")
    common: dict[str, Any] = Field(default_factory=dict, description="changes to the recipe that all settings share")
    settings: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="by name: dotted keys of the recipe and their values; `recipe` takes another recipe. {out} and "
        "{seed} in a text are replaced by the study's folder and the seed, so a setting can start from an earlier one",
    )
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    pretraining: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="runs that come first, by name, as settings: NAME_p0 and so on in the study's folder, one for each of "
        "`pretraining_seeds`. A setting whose text has {pretraining}, the seed, is trained from each of them",
    )
    pretraining_seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    generated: list[Generated] = Field(default_factory=list)
    subsets: Subsets | None = None
    manifests: dict[Path, Manifest] = Field(default_factory=dict, description="by path: subsets to write first")
    unseen: Path | None = Field(None, description="a dataset of identities that are not trained on")
    # DBSCAN and agglomeration join at the cosine of this false accept rate, because cosines depend on the loss
    far: str = Field("1e-02", description="false accept rate of the table")

    @field_validator("generated", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value or []

    @model_validator(mode="after")
    def _names_differ(self) -> Study:
        if both := self.settings.keys() & self.pretraining.keys():
            raise ValueError(f"{', '.join(sorted(both))} is a setting and a pretraining; give them different names")
        return self

    def values(self, name: str) -> dict[str, Any]:
        """What a setting or a pretraining run changes, and its recipe."""
        return self.pretraining[name] if name in self.pretraining else self.settings[name]

    def starts(self, name: str) -> list[str]:
        """The pretraining runs that a setting needs, directly or not, in the order of the study."""
        text = json.dumps(self.values(name))
        found = {other for other in self.pretraining if f"{{out}}/{other}_p" in text}
        for other in list(found):
            found.update(self.starts(other))
        return [other for other in self.pretraining if other in found]

    def overrides(self, setting: str) -> list[str]:
        """The changes of a setting to its recipe, as `key=value` words."""
        values = self.pretraining[setting] if setting in self.pretraining else self.common | self.settings[setting]
        return [f"{key}={json.dumps(value)}" for key, value in values.items() if key != "recipe"]


def read(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """A study file with `study.key=value` overrides.

    Raises:
        UserError: the file is not a study, or an override does not fit.
    """
    try:
        values = {"study": yaml.safe_load(path.read_text())}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"study {path} cannot be read: {' '.join(str(error).split())}") from error
    for override in overrides:
        recipes.apply(values, override)
    try:
        return Study.model_validate(values["study"])
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise UserError(f"study {path}: {'; '.join(wrong)}") from error
