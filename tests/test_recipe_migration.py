"""arcface_torch's configuration files as recipes: what is taken, what is listed as not taken, and that nothing is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.testing
import yaml

from lvtrain.errors import UserError
from lvtrain.planning import plan_phases
from lvtrain.recipe import arcface_torch
from lvtrain.recipe import files as recipes
from lvtrain.recipe.arcface_config import LARGEST_FILE, read_config
from lvtrain.recipe.arcface_migration import Migration, migrate
from lvtrain.recipe.sections import Recipe

HEAD = "from easydict import EasyDict as edict\n\nconfig = edict()\n"
SMALLEST = {"network": "r50", "rec": "/data/faces", "num_classes": 93431, "num_image": 5179510, "num_epoch": 20}
CNN: dict[str, Any] = {
    "margin_list": (1.0, 0.5, 0.0),
    "network": "r50",
    "resume": False,
    "output": None,
    "embedding_size": 512,
    "sample_rate": 1.0,
    "fp16": True,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "lr": 0.1,
    "verbose": 2000,
    "dali": False,
    "rec": "/train_tmp/ms1m-retinaface-t1",
    "num_classes": 93431,
    "num_image": 5179510,
    "num_epoch": 20,
    "warmup_epoch": 0,
    "val_targets": ["lfw", "cfp_fp", "agedb_30"],
}


def written(folder: Path, values: dict[str, Any], *, name: str = "theirs.py", lines: str = "") -> Path:
    path = folder / name
    path.write_text(HEAD + "".join(f"config.{key} = {value!r}\n" for key, value in values.items()) + lines)
    return path


def migrated(path: Path, gpus: int = 8) -> tuple[Recipe, Migration]:
    found = migrate(read_config(path), name=path.stem, gpus=gpus)
    return recipes.resolve(found.recipe), found


def test_a_cnn_becomes_the_shipped_baseline(tmp_path: Path) -> None:
    """The values of configs/ms1mv3_r50.py give the recipe arcface_r50_ms1mv3, but for the figures that are not theirs."""
    recipe, found = migrated(written(tmp_path, CNN, name="ms1mv3_r50.py"))
    assert found.not_taken == [] and {key for _, key, _ in found.taken} == CNN.keys()
    ours = recipes.load(Path(recipes.__file__).parents[1] / "recipes" / "arcface_r50_ms1mv3.yaml").model_dump()
    theirs = recipe.model_dump()
    ours["schedule"].pop("shape"), theirs["schedule"].pop("shape")  # in a straight line since 2023
    for key in ("backbone", "classifier", "method", "phases", "optimizer", "schedule", "deterministic"):
        assert theirs[key] == ours[key], key
    assert (recipe.name, recipe.seed, recipe.logging.every, recipe.data.threads) == ("ms1mv3_r50", 2048, 10, 2)
    assert recipe.evaluation.benchmarks["lfw"] == Path("/train_tmp/ms1m-retinaface-t1/lfw.bin")
    assert str(recipe.evaluation.every) == "2000 steps"
    assert all(plan.fits for plan in plan_phases(recipe, ranks=8).values())


def test_a_vit_with_gradient_accumulation(tmp_path: Path) -> None:
    values = SMALLEST | {"network": "vit_b", "margin_list": (1.0, 0.0, 0.4), "sample_rate": 0.3, "batch_size": 256}
    values |= {
        "gradient_acc": 12,
        "optimizer": "adamw",
        "lr": 0.001,
        "weight_decay": 0.1,
        "num_epoch": 40,
        "fp16": True,
    }
    recipe, found = migrated(written(tmp_path, values, lines="config.warmup_epoch = config.num_epoch // 10\n"))
    (phase,) = recipe.phases
    assert found.not_taken == []
    assert (phase.global_batch, phase.micro_batches, phase.sample_rate) == (256 * 8 * 12, 96, 0.3)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay) == ("adamw", 1e-3, 0.1)
    assert recipe.classifier is not None and recipe.classifier.optimizer.name == "adamw"
    assert (str(recipe.schedule.total), str(recipe.schedule.warmup)) == ("40 epochs", "4 epochs")
    assert recipe.backbone.overrides == {"drop_path": 0.1, "mask_ratio": 0.1}
    assert str(recipe.evaluation.every) == "166 steps"  # theirs counts micro-steps: 2000 / 12
    assert all(plan.fits for plan in plan_phases(recipe, ranks=8).values())


def test_absent_keys_have_the_values_of_their_base(tmp_path: Path) -> None:
    recipe, _ = migrated(written(tmp_path, SMALLEST))
    values = recipe.model_dump()
    assert (values["optimizer"]["name"], values["optimizer"]["lr"], values["optimizer"]["weight_decay"]) == (
        "sgd",
        0.1,
        5e-4,
    )
    assert values["classifier"]["margin"]["name"] == "arcface" and values["classifier"]["margin"]["m"] == 0.5
    assert (values["phases"][0]["global_batch"], values["optimizer"]["precision"]) == (1024, "float32")


@pytest.mark.parametrize(
    ("margin_list", "expected"),
    [
        ((1.0, 0.5, 0.0), {"name": "arcface", "m": 0.5, "straight_through": True}),
        ((1.0, 0.0, 0.35), {"name": "cosface", "m": 0.35}),
        ((1.0, 0.3, 0.2), {"name": "cosface", "m": 0.2}),  # their loss ignores m2 where m3 is above 0
        ((1.0, 0.0, 0.0), {"name": "arcface", "m": 0.0}),
        ((1.35, 0.0, 0.0), {"name": "combined", "m1": 1.35, "m2": 0.0, "m3": 0.0}),
    ],
)
def test_margins(tmp_path: Path, margin_list: tuple[float, ...], expected: dict[str, Any]) -> None:
    recipe, _ = migrated(written(tmp_path, SMALLEST | {"margin_list": margin_list}))
    assert recipe.classifier is not None
    assert expected.items() <= recipe.classifier.margin.model_dump().items()


def test_a_configuration_of_2021(tmp_path: Path) -> None:
    """`loss`, a step schedule that is not taken, and a rate for a batch of 512 (train.py of July 2021)."""
    values = SMALLEST | {"loss": "cosface", "num_image": "forget", "warmup_epoch": -1, "decay_epoch": [8, 12, 15, 18]}
    recipe, found = migrated(written(tmp_path, values))
    assert recipe.classifier is not None and recipe.classifier.margin.name == "cosface"
    assert {what.partition(" ")[0] for _, what, _ in found.not_taken} == {"num_image", "decay_epoch"}
    assert recipe.optimizer.peak_for(1024) == pytest.approx(0.2) and recipe.data.num_samples is None


@pytest.mark.parametrize("key", sorted(set(arcface_torch.table()["keys"]) - {"num_epoch", "network"}))
def test_no_key_is_lost_in_silence(tmp_path: Path, key: str) -> None:
    """A value that no key can have is listed with its line, and the recipe still loads."""
    path = written(
        tmp_path, {name: value for name, value in SMALLEST.items() if name != key} | {key: ["nonsense", [1]]}
    )
    _, found = migrated(path)
    (line, what, why) = next(entry for entry in found.not_taken if entry[1].startswith(f"{key} = "))
    assert line == path.read_text().splitlines().index(f"config.{key} = ['nonsense', [1]]") + 1
    assert why and "\n" not in what + why


@pytest.mark.parametrize(
    "line",
    [
        "config.lr = __import__('os').system('touch {ran}')",
        "config.lr = open('{ran}', 'w')",
        "config.lr = [open('{ran}', 'w') for _ in range(1)]",
        "config.lr = (lambda: open('{ran}', 'w'))()",
        'config.lr = f\'{{open("{ran}", "w")}}\'',
        "config.lr = (x := 1)",
        "config.lr = config.__class__",
        "config.lr = undefined_name",
        "config.lr = 9 ** 9 ** 9",
        "config.lr = 2.0 ** 1e300",
        "config.lr = [0] * 10 ** 12",
        "config.lr = 'a' * 10 ** 12",
        "config.lr = 1 / 0",
        "config.lr = 1e999",
        "config.lr = -True",
        "config.lr = 1 << 10",
        "config.lr = 1j",
        "config.lr = float('0.1')",
        "config.lr, config.seed = 0.1, 1",
        "config.lr = config.seed = 1",
        "open('{ran}', 'w')",
        'exec(\'open("{ran}", "w")\')',
        "for i in open('{ran}', 'w'): pass",
        "if open('{ran}', 'w'): config.lr = 0.2",
        "def lr_step_func(epoch): return 0.1",
        "del config.lr",
        "config.__dict__.update(lr=0.2)",
    ],
)
def test_nothing_is_run(tmp_path: Path, line: str) -> None:
    ran = tmp_path / "ran"
    text = line.replace("{ran}", str(ran)).replace("{{", "{").replace("}}", "}")
    path = written(tmp_path, SMALLEST, lines=text + "\n")
    recipe, found = migrated(path)
    assert not ran.exists() and recipe.optimizer.lr == 0.1
    assert [entry[0] for entry in found.not_taken] == [len(path.read_text().splitlines())]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("config.lr = 0.1 / 512 * 1024", 0.2),
        ("lr = 0.4\nconfig.lr = lr / 2", 0.2),
        ("config.lr = 0.1\nconfig.lr *= 2", 0.2),
        ("config['lr'] = 2e-1", 0.2),
        ("config.lr: float = +0.2", 0.2),
        ("config.seed = 10 ** 3 - 3 * 7 % 5\nconfig.lr = config.seed / 4995", 0.2),
    ],
)
def test_plain_arithmetic_is_read(tmp_path: Path, text: str, value: float) -> None:
    recipe, found = migrated(written(tmp_path, SMALLEST, lines=text + "\n"))
    assert recipe.optimizer.lr == pytest.approx(value, rel=2e-3) and found.not_taken == []


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"config.lr = = 1", "line 1"),
        (b"\xff\xfe\x00config", "UTF-8"),
        (b"config = \x00", "not"),
        (b"#" * (LARGEST_FILE + 1), "bytes"),
        (b"", "assigns no key"),
        (b"import os\n", "assigns no key"),
        (b"config.lr = " + b"(" * 5000 + b"1" + b")" * 5000, "not"),
        (b"config.lr = " + b"-" * 50_000 + b"1", "not"),
        (b"config.lr = " + b"1+" * 50_000 + b"1", "not"),
        (b"config.lr = " + b"9" * 5000, "not"),
        (b"{network: r50}", "assigns no key"),
    ],
)
def test_what_is_not_a_configuration_is_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "theirs.py").write_bytes(content)
    with pytest.raises(UserError) as caught:
        migrated(tmp_path / "theirs.py")
    message = str(caught.value)
    assert part in message and "theirs.py" in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    ("change", "part"),
    [({"network": "r2060"}, "r2060"), ({"network": ["r50"]}, "r50"), ({"num_epoch": None}, "num_epoch")],
)
def test_what_no_recipe_can_be_written_for(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    values = {key: value for key, value in (SMALLEST | change).items() if value is not None}
    with pytest.raises(UserError, match=part):
        migrated(written(tmp_path, values))


def command(*arguments: str) -> Any:
    from tools import migrate_config

    app = typer.Typer()
    app.command()(migrate_config.main)
    return typer.testing.CliRunner().invoke(app, list(arguments))


def test_the_tool_prints_or_writes(tmp_path: Path) -> None:
    values = CNN | {"wandb_key": "a-secret", "using_wandb": True, "wandb_project": "faces", "score": 1}
    path = written(tmp_path, values, name="wf42m_16gpus.py")
    printed = command(str(path))
    assert printed.exit_code == 0, printed.output
    recipe = recipes.resolve(yaml.safe_load(printed.stdout))
    assert (recipe.name, recipe.phases[0].micro_batches) == ("wf42m_16gpus", 16)
    assert [tracker.name for tracker in recipe.logging.trackers] == ["tensorboard", "wandb"]
    listed = re.findall(r"line (\d+): not taken: (\w+)", printed.stderr)
    assert [name for _, name in listed] == ["wandb_key", "score"] and "a-secret" not in printed.output
    assert "--nnodes 2 --nproc_per_node 8" in printed.stderr and "LVTRAIN_NODES=2" in printed.stderr
    out = tmp_path / "recipe.yaml"
    assert command(str(path), "--out", str(out), "--gpus", "4").exit_code == 0
    assert recipes.load(out).phases[0].micro_batches == 4
    again = command(str(path), "--out", str(out))
    assert again.exit_code == 2 and "exists" in again.stderr
    missing = command(str(tmp_path / "nowhere.py"))
    assert missing.exit_code == 2 and missing.stderr.count("\n") == 1
