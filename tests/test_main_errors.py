"""Mistakes of a user on the command line: one line that names them, an exit code that is not 0, no traceback."""

from __future__ import annotations

import errno
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lvtrain import errors
from lvtrain.backbones import create_backbone
from lvtrain.main import main
from tests.conftest import ROOT
from tests.runs import free_port, recipe_file


class FrontDoor:
    """Calls `lvtrain.main.main` in this process. What it refuses here, it refuses before anything is started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd
        monkeypatch.chdir(ROOT)
        # a start sets them in this process; monkeypatch restores them at the end
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    def refuses(self, recipe: Path, *arguments: str, ds_config: str = "ds_configs/zero2.json", ranks: int = 1) -> str:
        """The one line of the refusal, started as the first of `ranks`."""
        if ranks > 1:
            for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}.items():
                self.monkeypatch.setenv(name, value)
        status = main(["--recipe", str(recipe), "--ds_config", ds_config, *arguments])
        return refusal(status, self.capfd.readouterr().err, recipe)


def refusal(status: int, stderr: str, recipe: Path) -> str:
    assert status == 2, stderr
    line = stderr.strip().splitlines()[-1]
    assert line.startswith("lvtrain: error: ") and stderr.count("lvtrain: error:") == 1 and "Traceback" not in stderr, (
        stderr
    )
    assert not list((recipe.parent / "runs").rglob("*.safetensors"))
    return line


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> FrontDoor:
    return FrontDoor(monkeypatch, capfd)


@pytest.fixture
def copy(tiny_faces: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_faces / "train", tmp_path / "train")
    return tmp_path / "train"


def test_typo_in_a_recipe_key(door: FrontDoor, tiny_faces: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    assert "'optimizer'" in door.refuses(recipe, "optimzer.lr=1")
    # overrides on both sides of an option
    assert "'seed'" in door.refuses(recipe, "optimizer.lr=1", "--max-time", "5", "sed=1")


def test_num_classes_that_is_not_the_datasets(door: FrontDoor, tiny_faces: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    for override, found in (("data.num_classes=10", 24), ("data.num_classes=30", 24), ("data.num_samples=7", 240)):
        line = door.refuses(recipe, override)
        assert override in line and f" {found} " in line


def test_compiling_under_zero3(door: FrontDoor, tiny_faces: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    line = door.refuses(recipe, "backbone.compile=true", ds_config="ds_configs/zero3.json")
    assert "backbone.compile=false" in line and "zero2.json" in line


def test_a_missing_ds_config_is_reported_before_the_data_is_read(door: FrontDoor, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tmp_path / "nowhere")
    for dry in ([], ["--dry-run"]):
        assert "nothing.json" in door.refuses(recipe, *dry, ds_config="nothing.json")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02\xff")
    weights = str(tmp_path / "weights.pt")
    assert weights in door.refuses(tmp_path / "weights.pt") and weights in door.refuses(recipe, ds_config=weights)


def test_no_dataset(door: FrontDoor, tmp_path: Path) -> None:
    assert "dataset.json" in door.refuses(recipe_file(tmp_path, tmp_path / "nowhere"))


def test_no_images(door: FrontDoor, copy: Path, tmp_path: Path) -> None:
    said = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**said, "samples": 0, "shards": []}))
    header = (copy / "index.bin").read_bytes()[:64]
    (copy / "index.bin").write_bytes(header[:16] + bytes(8) + header[24:])
    assert str(copy) in door.refuses(recipe_file(tmp_path, copy))


def test_missing_shard_is_named(door: FrontDoor, copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.rglob("*.tar"))[0]
    shard.unlink()
    assert shard.name in door.refuses(recipe_file(tmp_path, copy))


def test_forbidden_shard_is_named(door: FrontDoor, copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.rglob("*.tar"))[0]
    access = os.access  # root may read everything
    door.monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shard and access(path, mode))
    assert shard.name in door.refuses(recipe_file(tmp_path, copy))


def test_truncated_tar_is_named(door: FrontDoor, copy: Path, tmp_path: Path) -> None:
    shard = sorted(copy.rglob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-5000])
    assert shard.name in door.refuses(recipe_file(tmp_path, copy))


def test_more_ranks_than_classes(door: FrontDoor, tiny_faces: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    overrides = [
        f"phases.{i}.{key}={value}" for i in range(3) for key, value in (("global_batch", 32), ("micro_batches", 32))
    ]
    line = door.refuses(recipe, *overrides, ranks=32)
    assert "32 ranks" in line and "24 classes" in line


def test_ranks_that_do_not_divide_v(door: FrontDoor, tiny_faces: Path, tmp_path: Path) -> None:
    assert "1, 2, 4 ranks" in door.refuses(recipe_file(tmp_path, tiny_faces / "train"), ranks=3)


@pytest.mark.parametrize(
    ("says", "named"),
    [
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 99}, "train_batch_size: 99"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimization"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            "zero_optimization.offload_optimizer: 'cpu'",
        ),
    ],
)
def test_json_that_contradicts_or_says_nothing(
    door: FrontDoor, tiny_faces: Path, tmp_path: Path, says: dict[str, object], named: str
) -> None:
    config = tmp_path / "ds.json"
    config.write_text(json.dumps(says))
    assert named in door.refuses(recipe_file(tmp_path, tiny_faces / "train"), ds_config=str(config))


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "start"])
def test_what_a_recipe_names_besides_the_data(
    door: FrontDoor, tiny_faces: Path, tmp_path: Path, dry: list[str]
) -> None:
    """A dry run refuses what a start refuses, and a refused start leaves no run folder."""
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    cut = tmp_path / "cut.bin"
    cut.write_bytes((tiny_faces / "heldout.bin").read_bytes()[:5000])
    (weights := tmp_path / "model.safetensors").write_bytes(cut.read_bytes())
    wider = tmp_path / "wider.safetensors"
    save_file(create_backbone("vit_nano", embedding_dim=32, dim=64, depth=1, heads=2).state_dict(), wider)
    save_file(create_backbone("iresnet18", embedding_dim=32).state_dict(), other := tmp_path / "iresnet.safetensors")
    for override, named in {
        "evaluation.benchmarks.lfw=nowhere/lfw.bin": ["evaluation.benchmarks.lfw: nowhere/lfw.bin"],
        f"evaluation.benchmarks.lfw={cut}": [f"evaluation.benchmarks.lfw: {cut}"],
        f"evaluation.benchmarks.lfw={tmp_path}": [f"evaluation.benchmarks.lfw: {tmp_path}"],
        "init_from=nowhere": ["init_from.path: nowhere"],
        f"init_from={cut}": [f"init_from.path: {cut}"],
        f"init_from={weights}": [f"init_from.path: {weights}"],
        f"init_from={wider}": [f"init_from.path: {wider}", "pos_embed", "(1, 49, 64)", "(1, 49, 32)"],
        f"init_from={other}": [f"init_from.path: {other}", "VisionTransformer"],
        f"init_from={{path: {tiny_faces / 'train'}}}": [str(tiny_faces / "train")],
        "backbone.overrides.depth=0": ["vit_nano", "depth"],
        "data.augmentation=dino": ["data.augmentation=dino", "flip"],
    }.items():
        line = door.refuses(recipe, override, *dry)
        assert all(name in line for name in named), line
        assert not (tmp_path / "runs" / "tiny").exists()
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / "runs" / "tiny" / name).write_text('{"run_id": "x", "attempt": 1}')
    shutil.copy(recipe, tmp_path / "runs" / "tiny" / "recipe.yaml")
    assert "seed: 5 -> 6" in door.refuses(recipe, "seed=6", *dry)
    if dry:  # a run that is resumed does not need its start weights
        (tmp_path / "runs" / "old" / "checkpoints" / "step_000000001").mkdir(parents=True)
        (tmp_path / "runs" / "old" / "checkpoints" / "step_000000001" / "manifest.json").touch()
        assert (
            main(
                ["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json", "name=old", "init_from=nowhere", *dry]
            )
            == 0
        )


def test_a_full_disk_is_one_line_and_exit_code_1(door: FrontDoor, tiny_faces: Path, tmp_path: Path) -> None:
    """Exit code 2 would end a chain of jobs."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    door.monkeypatch.setattr("lvtrain.training.checks.open_dataset", full)
    arguments = ["--recipe", str(recipe_file(tmp_path, tiny_faces / "train")), "--ds_config", "ds_configs/zero2.json"]
    assert main(arguments) == 1
    (line,) = door.capfd.readouterr().err.splitlines()
    assert line.startswith("lvtrain: error: ") and line.endswith(": No space left on device")
    assert errors.error_line(OSError(errno.EACCES, "Permission denied", "a.txt"), "b") == "a.txt: Permission denied"


def test_unknown_phase(door: FrontDoor, tiny_faces: Path, tmp_path: Path) -> None:
    line = door.refuses(recipe_file(tmp_path, tiny_faces / "train"), "--phase", "refine")
    assert "alignment, stabilisation, refinement" in line


def test_an_error_after_the_start_is_printed_once_by_two_ranks(tiny_faces: Path, tmp_path: Path) -> None:
    """With DeepSpeed's launcher, and an error that only a started run can find: the checkpoint to resume from is missing."""
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [
        "lvtrain/main.py",
        "--recipe",
        str(recipe),
        "--ds_config",
        "ds_configs/zero2.json",
        "checkpoint.resume=must",
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert said.count("lvtrain: error:") == 1 and "checkpoint.resume=must" in said and "Traceback" not in said, said


def test_three_ways_to_the_same_command(tiny_faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", str(recipe_file(tmp_path, tiny_faces / "train")), "--ds_config", "unused"]
    assert main([*arguments, "--print-config"]) == 0
    printed = capsys.readouterr().out
    for start in (["-m", "lvtrain"], ["lvtrain/main.py"]):
        command = [sys.executable, *start, *arguments, "--print-config"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == printed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pkgutil.resolve_name(project["scripts"]["lvtrain"]) is main
