"""Distillation: loss and gradients against the formula in float64, on several ranks; its runs by the front door; what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lvtrain.backbones import create_backbone
from lvtrain.data import Loader, ShardDataset
from lvtrain.data.augment import SETS, View, with_clean_twin
from lvtrain.main import main
from lvtrain.methods import StepInfo, create_method
from lvtrain.methods.distill import Distill, Teacher
from lvtrain.methods.supervised import SupervisedMethod
from lvtrain.methods.teacher import load_teacher
from lvtrain.planning import plan_phases
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import events, metrics, output, recipe_file, run
from tools.trial import contents

CLASSES, DIM, GLOBAL, VIRTUAL = 19, 8, 24, 4
MICRO, SIDE, SCALE, MARGIN, WEIGHT = GLOBAL // VIRTUAL, 6, 16.0, 0.3, 0.7
NOW = StepInfo(0, 0.1, 0.0, 0.0)


def small_recipe(method: dict[str, Any], margin: str = "cosface") -> Recipe:
    return recipes.resolve(
        {
            "name": "test",
            "seed": 3,
            "data": {"path": "none"},
            "backbone": {"name": "vit_nano", "embedding_dim": DIM},
            "classifier": {"margin": {"name": margin, "scale": SCALE, "m": MARGIN}},
            "method": {"distill": {"teacher": "handed in", "weight": WEIGHT}} | method,
            "phases": [{"name": "all", "global_batch": GLOBAL, "micro_batches": VIRTUAL}],
            "schedule": {"total": "10 steps"},
            "optimizer": {"precision": "float32"},
        }
    )


def linear_teacher() -> Teacher:
    torch.manual_seed(4)
    return Teacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, DIM)).requires_grad_(False), bytes(32), "linear")


def distilled(method: dict[str, Any], margin: str = "cosface") -> SupervisedMethod:
    recipe = small_recipe(method, margin)
    made = create_method(recipe, num_classes=CLASSES, device=torch.device("cpu"))
    assert isinstance(made, SupervisedMethod)
    made.distil_from(linear_teacher())
    made.enter_phase(recipe.phases[0], first_time=True)
    return made


def step_data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, images, labels of a global batch; four samples, three in one micro-batch, could not be decoded and are no numbers at all."""
    generator = torch.Generator().manual_seed(7)
    x = 3 * torch.randn(GLOBAL, DIM, generator=generator, dtype=torch.float64)
    images = torch.randn(GLOBAL, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, CLASSES, (GLOBAL,), generator=generator)
    bad = torch.tensor([0, 2, 3, 21])
    x[bad], images[bad], labels[bad] = torch.nan, torch.nan, -1
    return x, images, labels


def one_step(rank: int, ranks: int) -> dict[str, Any]:
    """Loss and gradients of the global batch as the loop and the engine make them, on this rank."""
    method = distilled({"name": "pco"})
    method.classifier.double()
    x, images, labels = step_data()
    method.begin_step(NOW, labels)
    accumulation = VIRTUAL // ranks
    gradients, losses, terms = [], [], []
    for micro in range(accumulation):
        first = (rank * accumulation + micro) * MICRO
        span = slice(first, first + MICRO)
        leaf = x[span].clone().requires_grad_()
        output = method.loss(leaf, SimpleNamespace(images=images[span], labels=labels[span]), NOW)
        (output.loss / accumulation).backward()
        gradients.append(leaf.grad)
        losses.append(output.loss.detach())
        terms.append(output.metrics["loss_distillation"])
    return {
        "loss": method.global_loss(torch.stack(losses).mean()),
        "term": torch.stack(terms).mean(),
        "x": torch.cat(gradients),
        "rows": method.classifier._step.gradient,
        "weight": method.classifier.weight.detach().clone(),
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_loss_and_gradients_are_the_formulas_on_any_number_of_ranks(ranks: int) -> None:
    results = [one_step(0, 1)] if ranks == 1 else run_ranks(ranks, one_step)
    x, images, labels = step_data()
    good = labels >= 0
    w, b = (tensor.double() for tensor in linear_teacher().backbone.state_dict().values())
    teacher = images[good].double().flatten(1) @ w.T + b
    x = x[good].requires_grad_()
    rows = torch.cat([result["weight"] for result in results]).double().requires_grad_()
    cosines = (x / x.norm(dim=1, keepdim=True)) @ (rows / rows.norm(dim=1, keepdim=True)).T
    logits = SCALE * (cosines - MARGIN * F.one_hot(labels[good], CLASSES))
    term = (1 - (x * teacher).sum(1) / (x.norm(dim=1) * teacher.norm(dim=1))).sum() / GLOBAL
    loss = (1 - WEIGHT) * F.cross_entropy(logits, labels[good], reduction="sum") / GLOBAL + WEIGHT * term
    loss.backward()
    for result in results:
        assert float(result["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert sum(float(result["term"]) for result in results) / ranks == pytest.approx(float(term), rel=1e-6)
    # the engine averages over ranks, so a rank's embedding gradient is ranks times the loss's
    gradient = torch.cat([result["x"] for result in results]).double() / ranks
    torch.testing.assert_close(gradient[good], x.grad, rtol=1e-5, atol=1e-8)  # the cosine to the teacher is float32
    assert not gradient[~good].any()
    torch.testing.assert_close(
        torch.cat([result["rows"] for result in results]).double(), rows.grad, rtol=1e-6, atol=1e-9
    )


def test_other_supervised_methods_are_distilled_too() -> None:
    """One whose network gives more than embeddings, and whose own loss has more parts than one."""
    method = distilled({"name": "cluster", "temperature": "learnable", "warmup": "0 steps"}, margin="arcface")
    x, images, labels = step_data()
    leaf, labels = x.float().nan_to_num().requires_grad_(), labels.clone()
    outputs, batch = (leaf, torch.ones(1)), SimpleNamespace(images=images, labels=labels)
    method.begin_step(NOW, labels)
    own = method.own_loss(outputs, batch, NOW)
    mixed = method.loss(outputs, batch, NOW)
    assert own.metrics.keys() | {"loss_distillation"} == mixed.metrics.keys() and "loss_distillation" not in own.metrics
    assert float(mixed.loss) == pytest.approx(
        (1 - WEIGHT) * float(own.loss) + WEIGHT * float(mixed.metrics["loss_distillation"]), rel=1e-6
    )


def test_the_teacher_computes_in_the_students_precision() -> None:
    seen = []
    method = distilled({"name": "pco"})
    method.distillation.backbone.register_forward_hook(lambda module, inputs, result: seen.append(result))
    _, images, labels = step_data()
    for method.distillation.bfloat16 in (False, True):
        method.distillation.distance(torch.randn(GLOBAL, DIM), SimpleNamespace(images=images, labels=labels))
    assert [result.dtype for result in seen] == [torch.float32, torch.bfloat16] and not any(
        result.requires_grad for result in seen
    )


# ---------------------------------------------------------------------------------------------------------- by the front door


def weights(file: Path, seed: int, **changes: Any) -> Path:
    """A vit_nano of random weights, as others keep theirs."""
    torch.manual_seed(seed)
    backbone = create_backbone("vit_nano", **({"embedding_dim": 32} | changes))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(backbone.state_dict(), file)
    return file


def make(folder: Path, faces: Path, teacher: Path) -> Path:
    method = {"name": "pco", "window": 2, "distill": {"teacher": str(teacher), "weight": 0.8}}
    return recipe_file(folder, faces / "train", method=method, schedule={"total": "7 steps", "warmup": "2 steps"})


def test_a_stopped_run_goes_on_with_its_teacher_and_with_no_other(tiny_faces: Path, tmp_path: Path) -> None:
    """Same ranks: the same bits, the teacher moved elsewhere in between; another rank count and ZeRO stage: the same losses. Through a change of phase."""
    teacher = weights(tmp_path / "teacher.safetensors", 1)
    peaceful, alone, stopped = (make(tmp_path / name, tiny_faces, teacher) for name in ("peaceful", "alone", "stopped"))
    assert run(peaceful, ranks=2) == 0, output(peaceful)
    assert run(alone, ranks=1, zero=3) == 0, output(alone)
    assert run(stopped, ranks=2, environment={"LVTRAIN_FAULT": "loop.step:0:4:sigterm"}) == 75, output(stopped)

    folders = {name: tmp_path / name / "runs" / "tiny" for name in ("peaceful", "alone", "stopped")}
    (event,) = events(folders["stopped"], "teacher")
    assert event["name"].startswith("vit_nano from") and len(event["fingerprint"]) == 64
    another = weights(tmp_path / "another.safetensors", 2)
    assert run(stopped, f"method.distill.teacher={another}") == 2
    (refusal,) = (line for line in output(stopped).splitlines() if "lvtrain: error:" in line)
    assert "method.distill.teacher" in refusal and "another.safetensors" in refusal

    moved = shutil.move(teacher, tmp_path / "moved.safetensors")
    assert run(stopped, f"method.distill.teacher={moved}", ranks=2) == 0, output(stopped)
    ours, theirs = contents(folders["stopped"]), contents(folders["peaceful"])
    assert ours == theirs
    assert {name for name in ours if "distill" in name or "teacher" in name} == {
        "distill.teacher"
    }  # of the teacher, its fingerprint alone

    one, two = metrics(folders["alone"]), metrics(folders["peaceful"])
    for a, b in zip(one, two, strict=True):
        first = a["step"] == 1
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6 if first else 1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if first else 1e-2)
        assert a["loss_distillation"] == pytest.approx(b["loss_distillation"], rel=1e-5 if first else 1e-3)
    assert two[-1]["loss_distillation"] < two[0]["loss_distillation"] < 1.2


def test_a_teacher_that_cannot_be_is_refused_before_a_start(
    tiny_faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    damaged = create_backbone("vit_nano", embedding_dim=32).state_dict()
    damaged["blocks.1.mlp.fc1.weight"][0, 0] = torch.nan
    save_file(damaged, tmp_path / "nan.safetensors")
    (tmp_path / "model.onnx").write_bytes(b"")
    refused = {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "model.onnx": "has 0 inputs and 0 outputs; a recogniser has one of each",
        tmp_path / "nan.safetensors": "blocks.1.mlp.fc1.weight holds NaN or infinity",
        weights(
            tmp_path / "wide.safetensors", 1, embedding_dim=48
        ): "has embedding_dim 48, the student 32; set backbone.embedding_dim=48",
        weights(
            tmp_path / "large.safetensors", 1, image_size=144
        ): "has image_size 144, the student 112; set backbone.image_size=144",
    }
    for path, part in refused.items():
        recipe = make(tmp_path / "run", tiny_faces, path)
        for arguments in ([], ["--dry-run"]):
            status = main(["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json", *arguments])
            (line,) = capfd.readouterr().err.strip().splitlines()
            assert status == 2 and line.startswith("lvtrain: error: method.distill.teacher: ") and part in line
    assert not (tmp_path / "run" / "runs").exists()


def test_the_plan_counts_the_teacher(
    tiny_faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Dry run with the teacher; without data and teacher, which is another machine's plan, it says what it leaves out."""
    monkeypatch.chdir(ROOT)
    recipe = make(tmp_path, tiny_faces, weights(tmp_path / "teacher.safetensors", 1))
    arguments = ["--recipe", str(recipe), "--ds_config", "ds_configs/zero2.json", "--dry-run"]
    assert main(arguments) == 0
    said = capfd.readouterr().out
    assert f"method.distill.teacher: {tmp_path / 'teacher.safetensors'}\n" in said
    plans = plan_phases(recipes.load(recipe), ranks=1, num_classes=24)
    assert len(plans) == 3 and all("teacher activations" in found.memory for found in plans.values())
    elsewhere = [
        "data.path=/nowhere",
        "data.num_classes=24",
        "data.num_samples=240",
        "method.distill.teacher=/nowhere/run",
    ]
    assert main([*arguments, *elsewhere]) == 0
    said = capfd.readouterr().out
    assert "method.distill.teacher: /nowhere/run" in said
    plans = plan_phases(recipes.load(recipe, elsewhere), ranks=1)
    assert not any("teacher activations" in found.memory for found in plans.values())


def test_what_a_teacher_is(tmp_path: Path) -> None:
    """In evaluation mode and frozen; known by its weights, wherever they lie and whatever wraps them."""
    recipe = small_recipe({"name": "pco"})

    def loaded(path: Path) -> Teacher:
        return load_teacher(Distill(teacher=path), recipe.backbone)

    file = weights(tmp_path / "a.safetensors", 1, embedding_dim=DIM)
    wrapped = {
        f"module.{name}": value for name, value in load_file(file).items() if not name.endswith("num_batches_tracked")
    }
    torch.save(wrapped, tmp_path / "b.pt")
    first, second = loaded(file), loaded(tmp_path / "b.pt")
    assert (
        first.fingerprint
        == second.fingerprint
        != loaded(weights(tmp_path / "c.safetensors", 2, embedding_dim=DIM)).fingerprint
    )
    assert not any(module.training for module in first.backbone.modules()) and not any(
        p.requires_grad for p in first.backbone.parameters()
    )


# ------------------------------------------------------------------------------------------------------------- twin views


def test_the_clean_twin_has_the_crop_and_flip_of_the_degraded_image(tiny_faces: Path) -> None:
    """It takes no draws of its own: `image` is what it is without a twin, and with flips alone `clean` is the set `flip`'s image."""
    dataset = ShardDataset(tiny_faces / "train")

    def batch(views: str | tuple[View, ...]) -> dict[str, torch.Tensor]:
        with Loader(dataset, seed=3, micro_batch=12, micro_batches=1, augmentation=views, backend="torch") as batches:
            return next(batches).views

    for name in ("degraded", "strong"):
        both, alone = batch(with_clean_twin(SETS[name])), batch(name)
        assert both.keys() == {"image", "clean"} and torch.equal(both["image"], alone["image"])
        assert (both["image"] - both["clean"]).abs().mean(dim=(1, 2, 3)).gt(0.01).sum() > 6
    flipped = batch("flip")["image"]
    assert torch.equal(batch(with_clean_twin(SETS["degraded"]))["clean"], flipped)
    assert not torch.equal(batch("none")["image"], flipped)


def test_the_teacher_sees_the_clean_image(tiny_faces: Path, tmp_path: Path) -> None:
    """The first step's distance by the front door: the student's embedding of the degraded image to the teacher's of the clean one."""
    teacher = weights(tmp_path / "teacher.safetensors", 1)
    shape = {"dim": 32, "depth": 2, "heads": 2}
    distance = {}
    for view in ("clean", "same"):
        method = {"name": "pco", "window": 2, "distill": {"teacher": str(teacher), "view": view}}
        recipe = recipe_file(
            tmp_path / view,
            tiny_faces / "train",
            method=method,
            data={"block": 8, "augmentation": "degraded", "backend": "torch"},
            backbone={"name": "vit_nano", "embedding_dim": 32, "overrides": shape},
            schedule={"total": "1 steps", "warmup": "0 steps"},
        )
        assert run(recipe) == 0, output(recipe)
        distance[view] = metrics(tmp_path / view / "runs" / "tiny")[0]["loss_distillation"]
    read = recipes.load(recipe)
    student = create_method(read, num_classes=24, device=torch.device("cpu")).module.train()
    frozen = create_backbone("vit_nano", embedding_dim=32).eval()
    frozen.load_state_dict(load_file(teacher))
    terms: dict[str, list[torch.Tensor]] = {"clean": [], "same": []}
    with (
        torch.no_grad(),
        Loader(
            ShardDataset(read.data.path),
            seed=read.seed,
            block=8,
            micro_batch=4,
            micro_batches=4,
            augmentation=with_clean_twin(SETS["degraded"]),
            backend="torch",
        ) as batches,
    ):
        for _ in range(4):
            views = next(batches).views
            for name, seen in (("clean", views["clean"]), ("same", views["image"])):
                terms[name].append(1 - F.cosine_similarity(student(views["image"]), frozen(seen)))
    for name, found in terms.items():
        assert distance[name] == pytest.approx(float(torch.cat(found).mean()), rel=1e-4)
    assert abs(distance["clean"] - distance["same"]) > 1e-3
