"""A run that version 0.1.0 trained for 60 steps, resumed with today's code, gives that version's results bit for bit.

It samples no classes. A run with a sampling phase still ahead is refused, because the rule of sampling has changed.

The arithmetic is held to instructions that every x86 processor has (`expected.json`: environment), and square roots to
correct rounding (`exact_sqrt.py`). So the bits depend on the versions of torch, DeepSpeed and NumPy. With other versions,
or another architecture, losses are compared to 1e-4. Where the libraries generate other images the tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lvtrain.checkpoint import files
from lvtrain.checkpoint.reader import newest_summary, open_weights
from lvtrain.data import ShardDataset
from lvtrain.errors import UserError
from lvtrain.recipe import files as recipes
from lvtrain.training.earlier_starts import changes
from tests.conftest import ROOT
from tests.runs import events, free_port, metrics

OLD_RUN = ROOT / "tests" / "fixtures" / "old_run"
EXPECTED: dict[str, Any] = json.loads((OLD_RUN / "expected.json").read_text())


@pytest.fixture(scope="module")
def resumed(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after its last step."""
    folder = tmp_path_factory.mktemp("old") / "pco_r1"
    shutil.copytree(OLD_RUN, folder)
    manifest = files.read_manifest(folder / "checkpoints" / "step_000000060")
    if ShardDataset(tiny_faces / "train").fingerprint != manifest["fingerprint"]:
        pytest.skip("this machine's libraries generate other images than those the old run was trained on")
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(json.dumps(todays(values)))
    command = [
        sys.executable,
        "tests/exact_sqrt.py",
        "lvtrain/main.py",
        "--recipe",
        str(recipe),
        "--ds_config",
        "ds_configs/zero2.json",
    ]
    command += [f"runs={folder.parent}", f"data.path={tiny_faces / 'train'}"]
    # in new processes, because the environment matters only before torch is imported
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MKL_")}
    environment |= EXPECTED["environment"] | places
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=800)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:]
    return folder


def todays(values: dict[str, Any]) -> dict[str, Any]:
    """The old run's recipe as its owner would write it today."""
    from lvtrain.recipe.old_keys import translate

    return translate(values)


def same_versions() -> bool:
    return platform.machine() == "x86_64" and all(version(name) == it for name, it in EXPECTED["packages"].items())


def test_the_losses_go_on(resumed: Path) -> None:
    rows = {str(row["step"]): row["loss"] for row in metrics(resumed)}
    assert len(rows) == 90
    tolerance = 0.0 if same_versions() else 1e-4
    for step, loss in EXPECTED["loss"].items():
        assert rows[step] == pytest.approx(loss, rel=tolerance, abs=0), step
    (resume,) = events(resumed, "resume")
    assert resume["step"] == 60
    # its checkpoint has no count, but an epoch begins there
    assert [(row["epoch"], row["exact"], row["distinct"]) for row in events(resumed, "epoch")] == [
        (5, True, 240),
        (6, True, 240),
    ]
    assert [(row["phase"], row["step"]) for row in events(resumed, "phase_end")][-2:] == [
        ("stabilisation", 75),
        ("refinement", 90),
    ]


def test_the_weights_are_the_same_bits(resumed: Path) -> None:
    reader = open_weights(resumed).reader
    assert reader.names == EXPECTED["tensors"].keys()
    if not same_versions():
        pytest.skip(f"bits are compared with {EXPECTED['packages']} on x86-64 only")
    found = {}
    for name in reader.names:
        rows = reader.is_rows(name)
        tensor = reader.rows(name, 0, reader.shape(name)[0]) if rows else reader.replicated(name)
        digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    assert [name for name in sorted(found) if found[name] != EXPECTED["tensors"][name]] == []


def test_the_new_checkpoint_has_its_position_once(resumed: Path) -> None:
    folder = resumed / "checkpoints" / "step_000000090"
    content, state = files.read_manifest(folder), json.loads((folder / files.STATE).read_text())
    assert (content["step"], content["samples_seen"], content["phase"]) == (90, 90 * 16, "refinement")
    assert state.keys() == {"meta"}
    assert state["meta"]["class_sampling"] == 2
    assert state["meta"]["position"] == {
        "data_skip": 0,
        "phase_index": 2,
        "phase_start_step": 75,
        "phase_start_samples": 75 * 16,
        "phase_over": True,
    }


def test_sampling_by_the_old_rule_is_refused(tmp_path: Path) -> None:
    def resume(*sampled: int) -> list[str]:
        folder = tmp_path / str(sampled) / "pco_r1"
        shutil.copytree(OLD_RUN, folder)
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
        for phase in sampled:
            values["phases"][phase]["sample_rate"] = 0.5
        (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
        newest = newest_summary(folder)
        assert newest is not None
        return changes(folder, recipes.resolve(todays(values)), newest.fingerprint)

    # the run stands in the second phase
    assert resume() == resume(0) == []
    for sampled in (1, 2):
        with pytest.raises(UserError, match="samples classes by another rule"):
            resume(sampled)
