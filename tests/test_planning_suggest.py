"""The cheapest setting that fits, against a search of the whole grid; and the table of what breaks first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod
from pathlib import Path

import pytest

from lvtrain.errors import UserError
from lvtrain.planning import H200, ROOM, FrozenNetwork, Network, Plan, Zero, plan, suggest
from lvtrain.planning.phases import measure, phase_setup
from lvtrain.planning.scale import scale_cells, share, what_breaks
from lvtrain.recipe import files as recipes
from tests.test_planning_recipes import RECIPES, answer

IDENTITIES, RANKS = 20_000, 2
# little images, so that a phase's share of the time differs from its share of the images
IMAGES = {"alignment": 10_000, "stabilisation": 0, "refinement": 70_000}
MODES = ("none", "activation", "block")


@cache
def planned(mode: str, stage: int, phase: int, count: int) -> Plan:
    recipe = recipes.load(RECIPES / "quickstart.yaml", [f"backbone.checkpoint_blocks={mode}"])
    setup = phase_setup(recipe, recipe.phases[phase], *measured(mode), num_classes=IDENTITIES)
    return plan(replace(setup, ranks=RANKS, micro_batch=128 // count, accumulation=count // RANKS, zero=Zero(stage)))


@cache
def measured(mode: str) -> tuple[Network, tuple[FrozenNetwork, ...]]:
    return measure(recipes.load(RECIPES / "quickstart.yaml", [f"backbone.checkpoint_blocks={mode}"]))


@cache
def grid() -> list[tuple[float, float]]:
    """GPU-seconds of the run and the most memory of each point."""
    return list(points())


def points() -> Iterator[tuple[float, float]]:
    for mode, stage, *counts in product(MODES, (0, 1, 2, 3), *[(2, 4, 8, 16, 32, 64, 128)] * 3):
        plans = [planned(mode, stage, phase, count) for phase, count in enumerate(counts)]
        seconds = sum(
            images * found.step_seconds * RANKS / 128 for images, found in zip(IMAGES.values(), plans, strict=True)
        )
        yield seconds, max(found.total_memory for found in plans)


@pytest.mark.parametrize("room", [2.18e9, 2.25e9, 2.4e9, 100e9])
def test_nothing_cheaper_in_the_grid_fits(room: float) -> None:
    device = replace(H200, memory=room / ROOM)
    found = suggest(
        recipes.load(RECIPES / "quickstart.yaml"), IMAGES, ranks=RANKS, num_classes=IDENTITIES, device=device
    )
    seconds = sum(IMAGES[name] / one.images_per_second for name, one in found.phases.items())
    assert max(one.total_memory for one in found.phases.values()) <= room
    assert seconds == pytest.approx(min(cost for cost, memory in grid() if memory <= room))
    assert (seconds == pytest.approx(min(cost for cost, _ in grid()))) == (room > 2.35e9)  # small memory costs time
    assert found.tried == prod((3, 4, 3, 7))


def test_what_is_suggested_can_be_pasted(tmp_path: Path) -> None:
    arguments = [str(RECIPES / "quickstart.yaml"), "--ranks", "2", "--gpu", "rtx4090", "--json"]
    data = [f"data.path={tmp_path / 'absent'}", "data.num_classes=20000", "data.num_samples=50000"]
    found = json.loads(answer(*arguments, *data, "--suggest"))
    paste = found.pop("suggested setting")
    (tmp_path / "ds.json").write_text(json.dumps(paste["ds_config"]))
    again = json.loads(answer(*arguments, "--ds_config", str(tmp_path / "ds.json"), *data, *paste["overrides"]))
    assert again["whole run"] == found["whole run"] and again["whole run"]["fits"]
    assert again["refinement"]["memory"] == found["refinement"]["memory"]


def test_nothing_fits() -> None:
    small = replace(H200, memory=2e9)
    with pytest.raises(UserError, match="use more GPUs"):
        suggest(recipes.load(RECIPES / "quickstart.yaml"), IMAGES, ranks=2, num_classes=IDENTITIES, device=small)


def test_the_page_has_the_planners_table() -> None:
    """`lvtrain/planning/scale.md`, written by the command that it shows; its cells by hand."""
    recipe = RECIPES / "pco_vitl_webface42m.yaml"
    table = answer(str(recipe), "--scale-table").strip()
    page = (RECIPES.parent / "planning" / "scale.md").read_text()
    assert table in page, "run the command in scale.md again"
    cells = {(cell.ranks, cell.identities): cell for cell in scale_cells(recipes.load(recipe))}
    crowded = cells[8, 100_000_000]
    # 12.5 M class centres a GPU x 512 numbers x 4 bytes: centres, gradient, two moments, feature expectations
    assert what_breaks(crowded.before) == f"memory: class centres {12.5e6 * 512 * 4 * 5 / 1e9:.0f} GB"
    for cell in cells.values():
        assert cell.after.total_memory <= ROOM * H200.memory and share(cell.after) >= share(cell.before)
