"""The base class of evaluation protocols, and their registry.

Each file of `lvtrain/evaluation/protocols/` holds one protocol: a class with its name, the paths that it recognises, its
options, how it runs, and what tables and plots show.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure
from pydantic import Field

from lvtrain.evaluation import plots, shown
from lvtrain.recipe.base import Section
from lvtrain.recipe.registry import Registry
from lvtrain.weights import extract
from lvtrain.weights.extract import Setting

Result = dict[str, Any]


class Options(Section):
    """Options of a protocol. A subclass adds some."""


class Flip(Options):
    """The option that most protocols share."""

    flip: bool = Field(True, description="add the embedding of the mirrored image")


class Grouped(Options):
    """The option of protocols that compare one to one."""

    groups: Path | None = Field(
        None, description="table of identities, templates or images and their group, for error rates by group"
    )


class Protocol(ABC):
    """One protocol on one benchmark.

    Class attributes:
        title: what tables call it.
        options_class: its options, a recipe section.
        paths: how many paths a benchmark of it has.
        fallback: it recognises general paths, so another protocol that recognises the path is preferred.
        has_own_part: the report shows its results in their own part, not among the headlines.
    """

    title: ClassVar[str]
    options_class: ClassVar[type[Options]] = Options
    paths: ClassVar[int] = 1
    fallback: ClassVar[bool] = False
    has_own_part: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Whether a benchmark at `path` is of this protocol, if none is given."""
        return False

    @abstractmethod
    def run(self, forward: extract.Forward, paths: tuple[Path, ...], setting: Setting) -> Result:
        """Figures as JSON values, the same on every rank. A collective.

        Raises:
            UserError: the files cannot be read, or are too few for the protocol.
        """

    def check(self, paths: tuple[Path, ...]) -> None:
        """Refuses before training what `run` would refuse for its files.

        Raises:
            UserError: a file that is damaged or incomplete.
        """

    @classmethod
    @abstractmethod
    def figure(cls, result: Result) -> float:
        """The number in [0, 1] that training follows."""

    @classmethod
    @abstractmethod
    def headline(cls, result: Result) -> list[tuple[str, str]]:
        """What a table shows: (figure, value) pairs, the most important first."""

    @classmethod
    def rows(cls, result: Result) -> list[dict[str, str]]:
        """Rows of the protocol's table in the report: column -> text. By default error rates by group, where there are any."""
        return shown.group_rows(result)

    @classmethod
    def figures(cls, name: str, result: Result, paths: tuple[Path, ...], image_size: int) -> dict[str, Figure]:
        """Plots of one result by file name without suffix. By default error rates by group, where there are any."""
        return plots.of_groups(name, result)


PROTOCOLS: Registry[type[Protocol]] = Registry("protocol", "lvtrain.evaluation.protocols")


@dataclass(frozen=True)
class Task:
    """One benchmark of an evaluation."""

    name: str
    kind: str
    paths: tuple[Path, ...]
    options: Options = field(default_factory=Options)


def followed(rates: Mapping[str, float]) -> float:
    """The rate at FAR 1e-4, or at the lowest FAR above it that is resolved; 0 if none is. `rates`: FAR as text -> rate."""
    resolved = [far for far in rates if float(far) >= 0.99e-4]
    return float(rates[min(resolved, key=float)]) if resolved else 0.0


def percent(share: float) -> str:
    """A share as text, in percent with two decimals."""
    return f"{100 * share:.2f}%"
