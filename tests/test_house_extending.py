"""One toy of each kind, written as a newcomer would: a class with a decorator, in one place, used by name from a recipe.

The toys are registered in another process, so that no other test sees them.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from pydantic import Field
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

from lvtrain.backbones import Backbone, register
from lvtrain.classifier.margins import MARGINS, Margin
from lvtrain.data.shards import ShardDataset
from lvtrain.datasets import importer
from lvtrain.engine.optimizers import BackboneOptimizer
from lvtrain.errors import UserError
from lvtrain.methods import METHODS, LossOutput, Method, MethodSection
from lvtrain.methods.base import initial_backbone
from lvtrain.methods.cost import Cost
from lvtrain.recipe import files as recipes
from lvtrain.recipe.base import setting
from lvtrain.recipe.classifier import MarginSection
from lvtrain.recipe.optimizer import OPTIMIZERS, Optimizer
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import metrics, recipe_file


def toy_method_and_backbone() -> None:
    class ToySection(MethodSection):
        length: float = 1.0

    @METHODS.register("toy_method")
    class ToyMethod(Method):
        """Draws every embedding to one length."""

        section = ToySection
        title = "embeddings of one length"

        def __init__(self, recipe: Any, *, num_classes: int, device: torch.device) -> None:
            self.settings, self.module = recipe.method, initial_backbone(recipe, device)

        @classmethod
        def cost(cls, recipe: Any, phase: Any) -> Cost:
            return Cost(views=2.0, per_image={"toy buffer": 1e6})

        def evaluated(self) -> nn.Module:
            return self.module

        def inputs(self, batch: Any) -> tuple[Any, ...]:
            return (batch.images,)

        def loss(self, outputs: Any, batch: Any, now: Any) -> LossOutput:
            return LossOutput((outputs.norm(dim=1) - self.settings.length).square().mean())

        def enter_phase(self, phase: Any, *, first_time: bool) -> None:
            pass

    @register("toy_backbone", width=4)
    @register("toy_backbone_wide", width=8)
    class ToyBackbone(Backbone):
        block_names = r"stages\.(\d+)\."
        first_names = ("stem.",)

        def __init__(self, *, width: int, **backbone: Any) -> None:
            super().__init__(**backbone)
            self.stem = nn.Conv2d(3, width, 8, 8)
            self.stages = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
            self.head = nn.Linear(width, self.embedding_dim)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.run_blocks(self.stages, self.stem(images))
            return self.head(x.mean(dim=(2, 3))).float()


def _toys_by_name(rank: int, ranks: int, recipe: str, run_folder: str) -> dict[str, Any]:
    from lvtrain.engine.parameter_groups import parameter_groups
    from lvtrain.main import main
    from lvtrain.planning import plan_phases
    from lvtrain.weights.models import load_model

    toy_method_and_backbone()
    arguments = ["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        planned = main([*arguments, "--dry-run"])
    loaded = recipes.load(recipe)
    plans = plan_phases(loaded, ranks=1, num_classes=24)
    with torch.device("meta"):
        groups = parameter_groups(initial_backbone(loaded, torch.device("meta")), loaded.optimizer)
    mistakes = []
    for override in ("method.lenght=2", "method=toy_metod", "backbone.overrides.widht=2"):
        try:
            METHODS.get("toy_method")(recipes.load(recipe, [override]), num_classes=1, device=torch.device("cpu"))
        except UserError as error:
            mistakes.append(str(error))
    trained = main(arguments)
    model = load_model(run_folder)
    return {
        "codes": (planned, trained),
        "plan": said.getvalue(),
        "parts": plans["only"].table(),
        "scales": {name: group.lr_scale for group in groups for name in group.parameters},
        "mistakes": mistakes,
        "embedding": model.forward(torch.zeros(2, 3, 112, 112)).shape,
    }


def test_a_method_and_a_backbone_are_one_class_each(tiny_faces: Path, tmp_path: Path) -> None:
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        backbone={"name": "toy_backbone", "embedding_dim": 6, "overrides": {}, "checkpoint_blocks": "block"},
        classifier=None,
        method={"name": "toy_method", "length": 2.0},
        phases=[{"name": "only", "global_batch": 16, "micro_batches": 4}],
        optimizer={"lr": 1e-2, "precision": "float32", "layer_decay": 0.5},
    )
    (found,) = run_ranks(1, _toys_by_name, str(recipe), str(tmp_path / "runs" / "tiny"))
    assert found["codes"] == (0, 0)
    assert "toy_method (embeddings of one length)" in found["plan"]
    assert "toy buffer" in found["parts"]
    of = found["scales"]
    expected = {"stem.weight": 0.0625, "stages.0.weight": 0.125, "stages.2.bias": 0.5, "head.weight": 1.0}
    assert {name: of[name] for name in expected} == expected
    unknown, misspelt, argument = found["mistakes"]
    assert "'method.lenght'" in unknown and "'length'" in unknown
    assert "'toy_method'" in misspelt and "'width'" in argument
    losses = [row["loss"] for row in metrics(tmp_path / "runs" / "tiny") if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    assert found["embedding"] == (2, 6)


def toy_margin() -> None:
    class ToySection(MarginSection):
        name: str = "toy_margin"
        shift: float = setting(0.1, "subtracted from the cosine", ge=0)

    @MARGINS.register("toy_margin")
    class ToyMargin(Margin):
        section = ToySection

        def target_logit(self, cosine: Any, labels: Any, norms: Any = None, **context: Any) -> Any:
            return self.scale * (cosine - self.warmup_factor * self.settings.shift)


def _plan_and_train_with_the_toy_margin(rank: int, ranks: int, recipe: str) -> tuple[int, int]:
    from lvtrain.main import main

    toy_margin()
    arguments = ["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")]
    return main([*arguments, "--dry-run"]), main(arguments)


def test_a_margin_is_one_class(tiny_faces: Path, tmp_path: Path) -> None:
    losses = {}
    for margin in ({"name": "toy_margin", "shift": 0.3}, {"name": "cosface", "m": 0.3}, {"name": "cosface", "m": 0.2}):
        name = "_".join(map(str, margin.values()))
        recipe = recipe_file(
            tmp_path,
            tiny_faces / "train",
            name=name,
            classifier={"margin": margin | {"scale": 16.0, "warmup": "2 steps"}},
            method="classification",
            phases=[{"name": "only", "global_batch": 16, "micro_batches": 4}],
            schedule={"total": "4 steps", "warmup": "0 steps"},
        )
        assert run_ranks(1, _plan_and_train_with_the_toy_margin, str(recipe)) == [(0, 0)]
        losses[name] = [row["loss"] for row in metrics(tmp_path / "runs" / name) if "loss" in row]
    toy, cosface, other = losses.values()
    assert len(toy) == 4 and toy == cosface and toy != other


class StripOptions(importer.Options):
    identities: int = Field(2, description="in equal parts of the strip")


class Strip(importer.Importer):
    """One image of many faces next to each other."""

    options_class = StripOptions

    def scan(self, out: Any) -> None:
        faces = Image.open(self.path).width // 112
        for number in range(faces):
            out.add(f"person{number * self.options.identities // faces}", f"face{number}", offset=number)

    def read(self, catalogue: Any, row: int) -> bytes:
        left = 112 * int(catalogue.rows[row]["offset"])
        face = io.BytesIO()
        Image.open(self.path).crop((left, 0, left + 112, 112)).save(face, "JPEG")
        return face.getvalue()


@pytest.fixture
def strip() -> Iterator[None]:
    importer.IMPORTERS.register("strip")(Strip)
    yield
    importer.IMPORTERS.unregister("strip")


def test_an_importer_is_packed_by_name(strip: None, tmp_path: Path) -> None:
    from tools.pack_dataset import main

    pixels = np.random.default_rng(0).integers(0, 255, (112, 6 * 112, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "strip.png")
    app = typer.Typer()
    app.command()(main)

    def packed(out: str, option: str) -> Any:
        arguments = [str(tmp_path / "strip.png"), str(tmp_path / out), "--kind", "strip", "--workers", "1"]
        return CliRunner().invoke(app, [*arguments, "--option", option])

    assert packed("out", "identities=3").exit_code == 0
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names() == ["person0", "person1", "person2"]
    assert np.bincount(dataset.labels(np.arange(6))).tolist() == [2, 2, 2]
    assert packed("other", "people=3").exit_code == packed("another", "identities=many").exit_code == 2


def toy_protocol() -> None:
    from lvtrain.evaluation.protocol import PROTOCOLS, Options, Protocol
    from lvtrain.evaluation.sources import labelled_images

    class ToyOptions(Options):
        power: int = 1

    @PROTOCOLS.register("toy_norm")
    class ToyNorm(Protocol):
        """Mean norm of the embeddings of a folder whose name ends in `.toy`."""

        title = "norms"
        options_class = ToyOptions

        @classmethod
        def matches(cls, path: Path) -> bool:
            return path.suffix == ".toy"

        def run(self, forward: Any, paths: tuple[Path, ...], setting: Any) -> dict[str, Any]:
            rows = setting.embed(forward, labelled_images(paths[0])[0], mirror=False)
            return {"norm": float((rows**2).sum(1).mean() ** (self.options.power / 2)), "images": len(rows)}

        @classmethod
        def figure(cls, result: dict[str, Any]) -> float:
            return float(result["norm"])

        @classmethod
        def headline(cls, result: dict[str, Any]) -> list[tuple[str, str]]:
            return [("mean norm", f"{result['norm']:.3f}")]


def _evaluate_with_the_toy(rank: int, ranks: int, recipe: str, folder: str) -> dict[str, Any]:
    from lvtrain.evaluation import suite
    from lvtrain.main import main

    toy_protocol()
    code = main(["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")])
    task = suite.parse(f"own:{folder}", {"toy_norm": {"power": 2}})
    return {
        "code": code,
        "kind": task.kind,
        "power": task.options.power,
        "named": suite.parse(f"a:toy_norm:{folder}").kind,
    }


def test_a_protocol_is_one_class(tiny_faces: Path, tmp_path: Path) -> None:
    folder = tmp_path / "faces.toy"
    (folder / "one").mkdir(parents=True)
    data = ShardDataset(tiny_faces / "train")
    for sample in range(3):
        (folder / "one" / f"{sample}.jpg").write_bytes(data.read(sample)[0])
    benchmarks = {
        "norms": {"protocol": "toy_norm", "path": str(folder), "power": 0},
        "pairs": str(tiny_faces / "heldout.bin"),
    }
    recipe = recipe_file(
        tmp_path,
        tiny_faces / "train",
        phases=[{"name": "only", "global_batch": 16, "micro_batches": 4}],
        schedule={"total": "1 steps", "warmup": "0 steps"},
        evaluation={"benchmarks": benchmarks},
    )
    (found,) = run_ranks(1, _evaluate_with_the_toy, str(recipe), str(folder))
    assert found == {"code": 0, "kind": "toy_norm", "power": 2, "named": "toy_norm"}
    final = json.loads((tmp_path / "runs" / "tiny" / "evaluation" / "final.json").read_text())["benchmarks"]
    assert final["norms"] == {"kind": "toy_norm", "norm": 1.0, "images": 3} and final["pairs"]["kind"] == "verification"


def toy_optimizer() -> None:
    class ToySection(Optimizer):
        name: str = "toy_sign"
        keep: float = setting(0.5, "share of the direction that is kept", ge=0, lt=1)

    class SignDescent(torch.optim.Optimizer):
        """w -= lr sign(d), d = keep d + (1 - keep) gradient."""

        found_inf: torch.Tensor
        grad_scale: torch.Tensor

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            if self.found_inf:
                return
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        direction = self.state[weight]["toy_direction"]
                        direction.lerp_(weight.grad / self.grad_scale, 1 - group["keep"])
                        weight.sub_(direction.sign(), alpha=group["lr"])

    @OPTIMIZERS.register("toy_sign")
    class ToySign(BackboneOptimizer):
        section = ToySection

        @staticmethod
        def state_names(section: Any) -> tuple[str, ...]:
            return ("toy_direction",)

        @staticmethod
        def create(groups: list[dict[str, Any]], section: Any) -> torch.optim.Optimizer:
            return SignDescent(groups, {"lr": 0.0, "keep": section.keep})


def _start_with_toy_optimizer(rank: int, ranks: int, recipe: str) -> int:
    from lvtrain.main import main

    toy_optimizer()
    return main(["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero2.json")])


def test_an_optimizer_is_one_class(tiny_faces: Path, tmp_path: Path) -> None:
    """It trains by name, and resumes to the same losses: the engine saves and loads the state that it names."""
    optimizer = {"name": "toy_sign", "keep": 0.25, "lr": 1e-3, "precision": "float32"}
    recipe = recipe_file(tmp_path, tiny_faces / "train", optimizer=optimizer)
    run, losses = tmp_path / "runs" / "tiny", []
    last = run / "checkpoints" / "step_000000012"
    for _ in range(2):
        assert run_ranks(1, _start_with_toy_optimizer, str(recipe)) == [0]
        losses.append([row["loss"] for row in metrics(run) if "loss" in row])
        with safe_open(last / "rank_00000.safetensors", "pt") as opened:
            names = set(opened.keys())
        assert "backbone.toy_direction.pos_embed" in names and "backbone.adam_step" not in names
        shutil.rmtree(last)
    assert losses[0] == losses[1] and len(losses[0]) == 12
