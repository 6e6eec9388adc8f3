"""Faulty recipes and DeepSpeed JSONs: a dry run refuses what a start refuses, in the same words, and takes what a start takes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lvtrain.main import main
from lvtrain.training import trainer
from tests.runs import output, recipe_file, run

ZERO: dict[str, Any] = {"stage": 2}

# key in the refusal -> overrides of the recipe
OVERRIDES = {
    "optimzer": ["optimzer.lr=1"],
    "optimizer.lr": ["optimizer.lr=.inf"],
    "optimizer.lr ": ["optimizer.lr=.nan"],
    "optimizer.lr  ": ["optimizer.lr=0"],
    "optimizer.clip": ["optimizer.clip=.inf"],
    "optimizer.weight_decay": ["optimizer.weight_decay=-.inf"],
    "optimizer.precision": ["optimizer.precision=fp16"],
    "optimizer.betas": ["optimizer={name: sgd, betas: [0.9, 0.99]}"],
    "sdg": ["optimizer.name=sdg"],
    "nesterov": ["optimizer={name: sgd, momentum: 0, nesterov: true}"],
    "lr_for_batch": ["optimizer.lr_for_batch=0"],
    "optimizer.lr   ": ["lr=0.1"],
    "optimizer.lr    ": ["optimizer.lr=yes"],
    "optimizer.betas ": ["optimizer.betas=[1.0, 0.99]"],
    "optimizer.betas  ": ["optimizer.betas=[0.9, 0.99, 0.9]"],
    "seed": ["seed=true"],
    "seed ": ["seed=1.5"],
    "phases": ["phases=[]"],
    "phases.0.end.cos2": ["phases.0.end.cos2=1.5"],
    "phases.0.global_batch ": ["phases.0.global_batch=on"],
    "'7'": ["phases.7.name=x"],
    "heads 3": ["backbone.overrides.heads=3"],
    "embedding_dim": ["backbone.embedding_dim=0"],
    "schedule.total   ": ["schedule.total=12"],
    "classifier.margin": ["classifier.margin=arcfaze"],
    "method.window": ["method.window=0"],
    "data.block": ["data.block=0"],
    "evaluation.benchmarks": ["evaluation.benchmarks={'../x': a.bin}"],
    "evaluation.benchmarks ": ['evaluation.benchmarks={"a\\nb": a.bin}'],
    "optimizer.lr is a value": ["optimizer.lr.x=5"],
    "schedule": ["schedule.warmup=13 steps"],
    "schedule.warmup": ["schedule.warmup=2 epochs"],
    "schedule.total": ["schedule.total=0 steps"],
    "schedule.total ": ["schedule.total=1e999 epochs"],
    "schedule.total  ": ["schedule.total=10 parsecs"],
    "schedule.shape": ["schedule.shape=step"],
    "name": ["name=a b"],
    "name ": ["name=../up"],
    "name  ": ["name=-x"],
    "name   ": ['name="x\\necho hi"'],
    "phases.0.name": ["phases.0.name=a;b"],
    "phase names": ["phases.1.name=alignment"],
    "phases.0.micro_batches": ["phases.0.virtual_batches=4"],
    "micro_batches": ["phases.0.micro_batches=3"],
    "phases.0.global_batch": ["phases.0.global_batch=0"],
    "phases.0.sample_rate": ["phases.0.sample_rate=1.5"],
    "phases.0.end.at_most": ["phases.0.end.at_most=0 steps"],
    "data.augmentation": ["data.augmentation=strongg"],
    "views": ["data.augmentation=dino"],
    "data.num_classes": ["data.num_classes=7"],
    "data.num_classes ": ["data.num_classes=4294967296"],
    "data.threads": ["data.threads=1025"],
    "data.num_samples": ["data.num_samples=7"],
    "cache": ["data.cache=local"],
    "backbone vit_nano": ["backbone.overrides.depth=0"],
    "argument 'dept'": ["backbone.overrides.dept=2"],
    "vit_nana": ["backbone.name=vit_nana"],
    "method": ["method=arcface"],
    "classifier": ["classifier=null"],
    "checkpoint.every": ["checkpoint.every=0 steps"],
    "checkpoint.keep_last": ["checkpoint.keep_last=1"],
    "nowhere.bin": ["evaluation.benchmarks.lfw=nowhere.bin"],
    "init_from.path": ["init_from=nowhere"],
    "init_from.classifier": ["init_from={path: x, head: means}"],
    "data.path": ["rec=faces.rec"],
    "trackers": ["logging.trackers=[tensorbored]"],
    "--phase": ["--phase", "nowhere"],
}

# key in the refusal -> what stands in the DeepSpeed JSON
JSONS: dict[str, Any] = {
    "zero_optimization.stge": {"zero_optimization": {"stge": 1}},
    "zero_optimization.stage": {"zero_optimization": {"stage": 4}},
    "zero_optimization.stage ": {"zero_optimization": {"stage": True}},
    "zero_optimization.stage  ": {"zero_optimization": {"stage": "2"}},
    "no zero_optimization": {},
    "zero_optimisation": {"zero_optimisation": ZERO},
    "elasticity": {"zero_optimization": ZERO, "elasticity": {"enabled": True}},
    "cpu_offload": {"zero_optimization": {"stage": 2, "cpu_offload": True}},
    "fp16": {"zero_optimization": ZERO, "fp16": {"enabled": True}},
    "bf16": {"zero_optimization": ZERO, "bf16": {"enabled": True}},
    "bf16 ": {"zero_optimization": ZERO, "bf16": True},
    "zenflow": {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
    "zero_quantized_gradients": {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
    "reduce_bucket_size": {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
    "overlap_comm": {"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}},
    "offload_optimizer.device": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
    "offload_optimizer": {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
    "offload_optimizer.pinned": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pinned": 1}}
    },
    "offload_optimizer.ratio": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    },
    "round_robin_gradients": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "zero_hpz_partition_size": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
    "offload_param": {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
    "steps_per_print": {"zero_optimization": ZERO, "steps_per_print": "often"},
    "wall_clock_breakdown": {"zero_optimization": ZERO, "wall_clock_breakdown": "yes"},
    "timers": {"zero_optimization": ZERO, "timers": [1]},
    "train_batch_size": {"zero_optimization": ZERO, "train_batch_size": 99},
    "gradient_clipping": {"zero_optimization": ZERO, "gradient_clipping": 1.0},
    "torch_autocast": {"zero_optimization": ZERO, "torch_autocast": True},
    "torch_autocast.enabled": {"zero_optimization": ZERO, "torch_autocast": {"enabled": True}},
    "prescale_gradients": {"zero_optimization": ZERO, "prescale_gradients": True},
    "optimizer": {"zero_optimization": ZERO, "optimizer": {"type": "Adam"}},
    "tensorboard": {"zero_optimization": ZERO, "tensorboard": {"enabled": True}},
    "object": [ZERO],
    "'stage'": '{"zero_optimization": {"stage": 1, "stage": 2}}',
    "'gradient_clipping'": '{"zero_optimization": {"stage": 1},\n\t"gradient_clipping": 1, "gradient_clipping": 2}',
    "not JSON": '{"zero_optimization": ',
    "NaN": '{"zero_optimization": {"stage": 1}, "gradient_clipping": NaN}',
    "deep": "[" * 100_000,
}
TAKEN: list[Any] = [
    {"zero_optimization": {}},
    {"zero_optimization": ZERO, "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "elasticity": {"enabled": False}},
    {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", "offload_param": {"device": "none"}}},
    {"zero_optimization": ZERO, "train_batch_size": "auto", "steps_per_print": 10, "wall_clock_breakdown": False},
]  # fmt: skip

# key in the refusal -> text of the recipe file
FILES = {
    "line 1 and in line 2": "optimizer: {lr: 1}\noptimizer: {lr: 2}",
    "'lr' is in line 2 and in line 4": "optimizer:\n  lr: 1.0e-3\n  clip: 2\n  lr: 1.0e-4\n",
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
    "aliases ": "data: &d [*d]",
    "deep": "[" * 2000,
    "not valid YAML": "a: [1,\nb: 2",
    "python/object": "name: !!python/object/apply:os.getcwd []",
    "mapping": "- a\n- b",
    "data is missing": "name: x",
    "bytes": "#" * (2 << 20),
    "UTF-8": b"name: \xff\xfe",
}  # fmt: skip


# key in the refusal -> what happened to the dataset folder
DATASETS: dict[str, Callable[[Path], Any]] = {
    "000000.tar is missing": lambda folder: (folder / "shards" / "000000.tar").unlink(),
    "000000.tar is cut": lambda folder: os.truncate(folder / "shards" / "000000.tar", 10240),
    "index.bin is missing": lambda folder: (folder / "index.bin").unlink(),
    "index.bin does not": lambda folder: os.truncate(folder / "index.bin", 84),
    "dataset.json is damaged": lambda folder: (folder / "dataset.json").write_text("{"),
    "1e999": lambda folder: _edit(folder, '"samples": ', '"samples": 1e999, "x": '),
    "schema 92": lambda folder: _edit(folder, '"schema": ', '"schema": 9'),
    "image_size": lambda folder: _edit(folder, '"image_size": ', '"image_size": "x", "x": '),
    "holds label": lambda folder: _edit(folder, '"num_classes": ', '"num_classes": 1, "x": '),
}


def _edit(folder: Path, old: str, new: str) -> None:
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace(old, new, 1))


class Door:
    """`main` as a start and as a dry run: the exit code and the last line."""

    def __init__(self, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.recipe, self.capsys = recipe, capsys

    def both(self, *arguments: str, config: Path | None = None) -> list[tuple[int, str]]:
        found = []
        for mode in ([], ["--dry-run"]):
            command = ["--recipe", str(self.recipe), "--ds_config", str(config or "ds_configs/zero2.json"), *mode]
            code = main([*command, *arguments])
            lines = self.capsys.readouterr().err.splitlines()
            found.append((code, lines[-1] if lines else ""))
        return found

    def refused(self, key: str, *arguments: str, config: Path | None = None) -> None:
        start, dry = self.both(*arguments, config=config)
        assert start == dry and start[0] == 2, (start, dry)
        assert key.strip() in start[1] and start[1].startswith("lvtrain: error: ")


@pytest.fixture
def door(tiny_faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Door:
    def started(*arguments: Any, **more: Any) -> Any:
        raise StartedError

    monkeypatch.setattr(trainer, "train", started)
    return Door(recipe_file(tmp_path, tiny_faces / "train"), capsys)


class StartedError(Exception):
    """Every check has passed, and the ranks would meet now."""


@pytest.mark.parametrize("key", OVERRIDES)
def test_a_faulty_recipe(key: str, door: Door) -> None:
    door.refused(key, *OVERRIDES[key])
    assert not (door.recipe.parent / "runs").exists()


@pytest.mark.parametrize("key", JSONS)
def test_a_faulty_deepspeed_json(key: str, door: Door, tmp_path: Path) -> None:
    content, config = JSONS[key], tmp_path / "x.json"
    config.write_text(content if isinstance(content, str) else json.dumps(content))
    door.refused(key, config=config)


@pytest.mark.parametrize("content", TAKEN, ids=str)
def test_a_good_deepspeed_json(content: Any, door: Door, tmp_path: Path) -> None:
    config = tmp_path / "x.json"
    config.write_text(json.dumps(content))
    assert main(["--recipe", str(door.recipe), "--ds_config", str(config), "--dry-run"]) == 0
    with pytest.raises(StartedError):
        main(["--recipe", str(door.recipe), "--ds_config", str(config)])


@pytest.mark.parametrize("key", FILES)
def test_a_faulty_recipe_file(key: str, door: Door) -> None:
    content = FILES[key]
    door.recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
    door.refused(key)


@pytest.mark.parametrize("key", DATASETS)
def test_a_damaged_dataset(key: str, door: Door, tiny_faces: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_faces / "train", tmp_path / "faces")
    DATASETS[key](tmp_path / "faces")
    door.refused(key, f"data.path={tmp_path / 'faces'}")


@pytest.mark.parametrize("minutes", ["nan", "inf", "0", "-5", "x"])
def test_a_time_limit_is_positive(minutes: str, door: Door) -> None:
    with pytest.raises(SystemExit) as end:
        door.both(f"--max-time={minutes}")
    assert end.value.code == 2


def test_a_fifo_is_not_read(door: Door, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    door.refused("x.json", config=tmp_path / "x.json")
    door.recipe.unlink()
    os.mkfifo(door.recipe)
    door.refused("recipe.yaml")


def test_another_recipe_in_the_folder_of_a_run(door: Door) -> None:
    run_folder = door.recipe.parent / "runs" / "tiny"
    run_folder.mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl"):
        (run_folder / name).write_text('{"run_id": "x", "attempt": 1}')
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(door.recipe.read_text())))
    code = main(["--recipe", str(door.recipe), "--ds_config", "ds_configs/zero2.json", "--dry-run", "seed=6"])
    assert code == 2 and "seed" in door.capsys.readouterr().err
    assert run(door.recipe, "seed=6") == 2
    assert "(seed: 5 -> 6)" in output(door.recipe)


@pytest.mark.parametrize("change", ["seed=6", "data.path=OTHER"])
def test_a_refused_start_leaves_the_folder_of_a_finished_run_as_it_was(
    change: str, trained: tuple[Path, Path], door: Door
) -> None:
    recipe, other = trained
    folder, change = recipe.parent / "runs" / "tiny", change.replace("OTHER", str(other))

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lease.json"}

    before = content()
    arguments = ["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json", change]
    assert main([*arguments, "--dry-run"]) == 2 and "name=..." in door.capsys.readouterr().err
    assert run(recipe, change) == 2 and "name=..." in output(recipe)
    after = content()
    assert after.keys() == before.keys() and [path for path in after if after[path] != before[path]] == []


@pytest.fixture(scope="module")
def trained(tiny_faces: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recipe of a run that is done, and a dataset of as many images with other labels."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(tiny_faces / "train", folder / "other")
    labels = folder / "other" / "labels.txt"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    manifest = json.loads((folder / "other" / "dataset.json").read_text())
    manifest["labels_sha256"] = hashlib.sha256(labels.read_bytes()).hexdigest()
    (folder / "other" / "dataset.json").write_text(json.dumps(manifest))
    recipe = recipe_file(folder, tiny_faces / "train")
    assert run(recipe) == 0
    return recipe, folder / "other"


@pytest.mark.parametrize(
    ("arguments", "content", "key"),
    [
        (["schedule.warmup=2 epochs"], {"zero_optimization": ZERO}, "schedule.warmup"),
        (["optimizer.lr=.inf"], {"zero_optimization": ZERO}, "optimizer.lr"),
        ([], {"zero_optimization": {"stge": 1}}, "zero_optimization.stge"),
        ([], {"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload"),
    ],
)
def test_real_ranks_say_one_line(
    tiny_faces: Path, tmp_path: Path, arguments: list[str], content: Any, key: str
) -> None:
    recipe = recipe_file(tmp_path, tiny_faces / "train")
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert run(recipe, "--ds_config", str(tmp_path / "x.json"), *arguments, ranks=2) == 2
    errors = [line for line in output(recipe).splitlines() if "lvtrain: error: " in line]
    assert len(errors) == 1 and key in errors[0] and "Traceback" not in output(recipe)
