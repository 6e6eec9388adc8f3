"""A run folder whose small files were lost: what is made again from the newest checkpoint, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lvtrain.checkpoint.checkpoints import Checkpoints
from lvtrain.checkpoint.lease import hold
from lvtrain.checkpoint.state import Replicated
from lvtrain.classifier import sampling
from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.training.run_folder import RunFolder, open_folder
from lvtrain.training.telemetry import Telemetry
from lvtrain.training.trackers import TrackedRun
from tests.runs import recipe_file

ALONE = World(0, 1, 0, torch.device("cpu"))


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    return recipes.load(recipe_file(folder, folder / "data"), list(overrides))


def start(folder: Path, *overrides: str) -> RunFolder:
    return open_folder(recipe_in(folder, *overrides), {}, ALONE, fingerprint="f", facts={})


@pytest.fixture
def trained(tmp_path: Path) -> RunFolder:
    """A run with one checkpoint, started twice."""
    start(tmp_path)
    run = start(tmp_path)
    meta = {"recipe": recipe_in(tmp_path).model_dump(mode="json"), "class_sampling": sampling.RULE}
    with (
        hold(run.path, ALONE) as lease,
        Checkpoints(run.path, ALONE, run_id=run.run_id, fingerprint="f", lease=lease) as checkpoints,
    ):
        checkpoints.save(3, 48, "alignment", {"w": Replicated(torch.zeros(2))}, meta)
        checkpoints.wait()
    return run


@pytest.mark.parametrize("left", [None, "", '{"run_id": "12', "[]"])
def test_a_lost_run_id_is_the_newest_checkpoints(trained: RunFolder, tmp_path: Path, left: str | None) -> None:
    path = trained.path / "run.json"
    path.unlink() if left is None else path.write_text(left)
    assert start(tmp_path).run_id == trained.run_id
    assert start(tmp_path).run_id == trained.run_id  # and written again


@pytest.mark.parametrize("left", [None, "", "name: [", b"\xff\xfe"])
def test_a_lost_recipe_is_the_newest_checkpoints(trained: RunFolder, tmp_path: Path, left: str | bytes | None) -> None:
    path = trained.path / "recipe.yaml"
    path.unlink() if left is None else path.write_bytes(left.encode() if isinstance(left, str) else left)
    with pytest.raises(UserError, match="seed"):  # it still knows what must not change
        start(tmp_path, "seed=6")
    assert start(tmp_path).run_id == trained.run_id
    assert yaml.safe_load(path.read_text())["seed"] == 5


def test_a_lost_recipe_that_no_checkpoint_has_is_named(trained: RunFolder, tmp_path: Path) -> None:
    (trained.path / "recipe.yaml").write_text("")
    (trained.path / "checkpoints" / "step_000000003").rename(tmp_path / "elsewhere")
    (trained.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        start(tmp_path)


def test_checkpoints_alone_are_not_a_run(trained: RunFolder, tmp_path: Path) -> None:
    """Somebody's checkpoints copied into a new folder: not adopted, because nothing says with which recipe."""
    for name in ("run.json", "recipe.yaml"):
        (trained.path / name).unlink()
    assert start(tmp_path).run_id != trained.run_id


def test_a_row_is_not_glued_to_one_that_a_crash_cut(trained: RunFolder) -> None:
    telemetry = Telemetry(TrackedRun(trained.path, trained.run_id, {}), ALONE)
    telemetry.event("one")
    with open(trained.path / "events.jsonl", "a") as file:
        file.write('{"event": "cu')
    telemetry.event("two")
    telemetry.event("three")
    lines = (trained.path / "events.jsonl").read_text().splitlines()
    assert lines[1] == '{"event": "cu' and ['"two"' in lines[2], '"three"' in lines[3], len(lines)] == [True, True, 4]


def test_another_kernel_than_before_is_reported(tmp_path: Path) -> None:
    """And a package whose version decides pixels or rounding; nothing at the first start, or of a start that did not note it."""

    def surroundings(**facts: str) -> list[str]:
        recipe = recipe_in(tmp_path)
        return open_folder(recipe, {}, ALONE, fingerprint="f", facts=facts).surroundings

    assert surroundings() == []
    assert surroundings(classifier_kernel="torch") == []
    (changed,) = surroundings(classifier_kernel="triton")
    assert changed.startswith("classifier_kernel: torch -> triton")
    (changed,) = surroundings(classifier_kernel="triton", compiled="block by block")  # before, it was not noted
    assert changed.startswith("compiled: None -> block by block")
    assert surroundings(classifier_kernel="triton", compiled="block by block") == []
    environment = tmp_path / "runs" / "tiny" / "environment.json"
    noted = json.loads(environment.read_text())
    installed, noted["packages"]["torch"] = noted["packages"]["torch"], "2.0.0"
    environment.write_text(json.dumps(noted))
    (changed,) = surroundings(classifier_kernel="triton", compiled="block by block")
    assert changed.startswith(f"packages.torch: 2.0.0 -> {installed}")
