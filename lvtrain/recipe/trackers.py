"""The elements of a recipe's `logging.trackers`; the trackers themselves are in `lvtrain.training.trackers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from lvtrain.recipe.base import Section
from lvtrain.recipe.registry import Registry, named_section

TRACKERS: Registry[Any] = Registry("tracker", "lvtrain.training.trackers")


class TrackerSection(Section):
    """A bare name is short for `{name: NAME}`. A tracker with settings extends this section."""

    name: str = Field(description="name of the tracker")


if TYPE_CHECKING:
    AnyTracker = TrackerSection
else:
    AnyTracker = named_section(TRACKERS)
