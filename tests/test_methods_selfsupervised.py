"""DINO, LAFS and fine-tuning against references written from the papers, and their limit cases."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lvtrain.data import Batch
from lvtrain.data.augment import SETS
from lvtrain.distributed import world as worlds
from lvtrain.errors import UserError
from lvtrain.methods import StepInfo, create_method
from lvtrain.methods.dino import DinoMethod, dino_loss
from lvtrain.methods.lafs import landmark_view
from lvtrain.methods.student import ProjectionHead
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.training.meter import Meter
from tests.ranks import run_ranks

CPU = torch.device("cpu")
PART = {"dim": 16, "depth": 1, "heads": 2, "head_dim": 8, "mlp_dim": 32, "patch": 8}


def recipe(method: dict[str, Any], **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "small",
        "data": {"path": "nowhere", "augmentation": {"dino": "dino", "lafs": "lafs"}.get(method["name"], "flip")},
        "backbone": {
            "name": "part_fvit_tiny",
            "embedding_dim": 16,
            "image_size": 32,
            "overrides": PART | {"freeze_landmarks": True},
        },
        "method": method,
        "phases": [{"name": "only", "global_batch": 8, "micro_batches": 4}],
        "schedule": {"total": "10 steps"},
        "optimizer": {"precision": "float32"},
    }
    return recipes.resolve(values | changes)


DINO = {"name": "dino", "prototypes": 37, "hidden": 24, "bottleneck": 12, "centre_momentum": 0.8}


def batch(count: int, *, locals_: int = 3, seed: int = 0, size: int = 32, local: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    names = ["global_0", "global_1", *(f"local_{i}" for i in range(locals_))]
    views = {
        n: torch.rand(count, 3, *((size, size) if n[0] == "g" else (local, local)), generator=generator) * 2 - 1
        for n in names
    }
    views |= {f"{name}_landmarks": view.flip(1) for name, view in list(views.items())}
    return Batch(views, torch.arange(count), torch.arange(count) + 100 * seed)


# ------------------------------------------------------------------------------------------------------------------- DINO


def test_loss_equals_a_plain_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(5, 7, 11, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    centre = torch.randn(11, generator=generator, dtype=torch.float64)
    weights = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    ours = dino_loss(student, teacher, centre, student_temperature=0.1, teacher_temperature=0.05, weights=weights)

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    s, t, c = student.numpy(), teacher.numpy(), centre.numpy()
    terms = []
    for i in range(2):
        for j in range(5):
            if i != j:
                per = [
                    -(softmax((t[i, b] - c) / 0.05) * np.log(softmax(s[j, b] / 0.1))).sum() * float(weights[b])
                    for b in range(7)
                ]
                terms.append(sum(per) / 7)
    assert float(ours) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_teacher_and_centre_follow_the_formulas() -> None:
    """Half-way through the warm-up of the teacher's temperature, with a centre, drop path in the student only, and a sample that was not decoded."""
    settings = DINO | {
        "student_temperature": 0.2,
        "teacher_temperature_start": 0.02,
        "teacher_temperature": 0.06,
        "teacher_warmup_epochs": 1,
    }
    overrides = PART | {"depth": 2, "drop_path": 0.5}
    method = create_method(
        recipe(settings, backbone={"name": "fvit_tiny", "embedding_dim": 16, "image_size": 32, "overrides": overrides}),
        num_classes=4,
        device=CPU,
    )
    assert isinstance(method, DinoMethod)
    now = StepInfo(step=0, lr=0.1, progress=0.25, epoch=0.5)
    before = {name: tensor.clone() for name, tensor in method.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.add_(torch.randn_like(parameter))
    method.module.train()
    method.begin_step(now, torch.arange(4))
    data = batch(4)
    data.labels[1] = -1
    centre = method.centre.uniform_(-1, 1).clone()
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    outputs = method.module(*method.inputs(data))
    loss = method.loss(outputs, data, now).loss
    with torch.no_grad():
        logits, _ = copy.deepcopy(method.teacher).eval()(data.views["global_0"], data.views["global_1"])
    expected = dino_loss(outputs[0], logits, centre, student_temperature=0.2, teacher_temperature=0.04, weights=weights)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert method.teacher_temperature(StepInfo(step=0, lr=0.1, progress=0.9, epoch=3.0)) == pytest.approx(0.06)
    method.end_step(now, nullcontext)
    momentum = 1 - (1 - 0.996) * (math.cos(math.pi * 0.25) + 1) / 2
    for name, parameter in method.module.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * parameter
        assert torch.allclose(method.teacher.get_parameter(name), expected, atol=1e-6), name
    assert torch.allclose(method.centre, 0.8 * centre + 0.2 * (logits * weights[:, None]).mean(dim=(0, 1)), atol=1e-6)


def test_the_head_is_torchs_weight_norm_with_norms_of_one() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(8, 37, hidden=6, bottleneck=4).double()
    theirs = weight_norm(nn.Linear(4, 37, bias=False, dtype=torch.float64))
    given = theirs.parametrizations.weight  # type: ignore[union-attr]
    with torch.no_grad():
        given.original0.fill_(1.0)
        given.original1.copy_(head.prototypes.weight)
    x = torch.randn(5, 8, dtype=torch.float64)
    target = torch.randn(5, 37, dtype=torch.float64)
    logits, expected = head(x), theirs(nn.functional.normalize(head.mlp(x).detach(), dim=-1))
    assert torch.allclose(logits, expected, atol=1e-12) and float(logits.detach().abs().max()) <= 1
    (logits * target).sum().backward()
    (expected * target).sum().backward()
    assert torch.allclose(head.prototypes.weight.grad, given.original1.grad, atol=1e-12)


def test_prototypes_keep_still_for_the_first_epoch() -> None:
    method = create_method(recipe(DINO), num_classes=4, device=CPU)
    data, gradients = batch(4, local=32), []
    for epoch in (0.99, 1.0):
        now = StepInfo(step=0, lr=0.1, progress=0.0, epoch=epoch)
        method.begin_step(now, torch.arange(4))
        method.loss(method.module(*method.inputs(data)), data, now).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in method.module.named_parameters() if p.grad is not None})
        method.module.zero_grad()
    still, moving = gradients
    last = "head.prototypes.weight"
    assert not still[last].any() and moving[last].abs().max() > 0
    assert still.keys() == moving.keys() and all(
        torch.equal(still[name], moving[name]) for name in still if name != last
    )


def test_the_teacher_runs_in_the_students_precision() -> None:
    method = create_method(recipe(DINO, optimizer={"precision": "bfloat16"}), num_classes=4, device=CPU)
    seen = []
    method.teacher.head.mlp[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))  # type: ignore[attr-defined]
    now, data = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0), batch(2, local=32)
    method.begin_step(now, torch.arange(2))
    output = method.loss(method.module(*method.inputs(data)), data, now)
    assert seen == [torch.bfloat16] and output.loss.dtype == torch.float32


def test_a_discarded_step_leaves_teacher_and_centre() -> None:
    method = create_method(recipe(DINO), num_classes=4, device=CPU)
    before = {name: saved.tensor.clone() for name, saved in method.state().items()}
    now, data = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0), batch(4, local=32)
    for views in (data.views, {name: view * math.nan for name, view in data.views.items()}):
        data.views = views
        method.begin_step(now, torch.arange(4))
        output = method.loss(method.module(*method.inputs(data)), data, now)
    assert not torch.isfinite(output.loss)
    method.discard_step()
    assert all(torch.equal(saved.tensor, before[name]) for name, saved in method.state().items())


def _on_ranks(rank: int, size: int) -> tuple[torch.Tensor, list[float]]:
    """DINO's centre; its loss, that of fine-tuning with anchored landmarks, and a figure of the log line, taken up again from a checkpoint."""
    method = create_method(recipe(DINO), num_classes=4, device=CPU)
    assert isinstance(method, DinoMethod)
    now = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0)
    method.begin_step(now, torch.arange(8))
    losses, figures = [], []
    for micro in range(4 // size):
        data = batch(2, seed=rank * (4 // size) + micro)
        output = method.loss(method.module(*method.inputs(data)), data, now)
        losses.append(output.loss.detach())
        figures.append(output.metrics)
    loss = method.global_loss(torch.stack(losses).mean())
    method.end_step(now, nullcontext)
    meter, resumed = Meter(CPU), Meter(CPU)
    meter.add(loss, figures)
    (state,) = {json.dumps(state) for state in worlds.gather_objects(meter.state())}  # rank 0 writes it, all read it
    resumed.load_state(json.loads(state))

    settings = recipe(
        {"name": "finetune", "landmarks": "anchored", "beta": 0.5},
        backbone={"name": "part_fvit_tiny", "embedding_dim": 16, "image_size": 32, "overrides": PART},
        init_from={"path": "read by the trainer"},
    )
    tuned = create_method(settings, num_classes=8, device=CPU)
    tuned.enter_phase(settings.phases[0], first_time=True)
    with torch.no_grad():
        tuned.evaluated().get_submodule("output_layer.1").weight.mul_(1.5)
    tuned.begin_step(now, torch.arange(8))
    losses = []
    for micro in range(4 // size):
        v = rank * (4 // size) + micro
        data = Batch({"image": batch(2, seed=v).views["global_0"]}, torch.arange(2) + 2 * v, torch.arange(2))
        losses.append(tuned.loss(tuned.module(*tuned.inputs(data)), data, now).loss.detach())
    anchored = tuned.global_loss(torch.stack(losses).mean())
    return method.centre, [float(loss), float(anchored), resumed.means()[1]["prototype_entropy"]]


def test_centre_losses_and_figures_are_the_same_on_1_2_and_4_ranks() -> None:
    answers = {size: run_ranks(size, _on_ranks) for size in (1, 2, 4)}
    centre, values = answers[1][0]
    for size, results in answers.items():
        for other, others in results:
            assert torch.equal(other, centre), size
            assert others == pytest.approx(values, rel=2e-6), size


def test_views_that_cannot_be_trained_on_are_refused() -> None:
    iresnet = {"name": "iresnet18", "embedding_dim": 16, "image_size": 112}
    for method, augmentation, fitting in ((DINO, "flip", "global_1"), (LAFS, "dino", "global_1_landmarks")):
        with pytest.raises(UserError) as error:
            changes = {"data": {"path": "nowhere", "augmentation": augmentation}}
            create_method(recipe(method, **changes), num_classes=4, device=CPU)
        expected = [name for name, views in SETS.items() if fitting in {view.name for view in views}]
        assert str(error.value).endswith(", ".join(expected)) and f"augmentation={augmentation}" in str(error.value)
    with pytest.raises(UserError, match=r"data\.augmentation=dino .* none, flip, arcface"):
        create_method(
            recipe({"name": "pco"}, data={"path": "nowhere", "augmentation": "dino"}), num_classes=4, device=CPU
        )
    with pytest.raises(UserError, match=r"iresnet18 .*112 .*data\.augmentation=dino.* 48"):
        create_method(recipe(DINO, backbone=iresnet), num_classes=4, device=CPU)


def test_a_collapse_is_reported() -> None:
    method = create_method(recipe(DINO), num_classes=4, device=CPU)
    now = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0)
    healthy = {
        "feature_std": 0.2,
        "teacher_entropy": 1e-4,
        "prototype_entropy": 2.0,
    }  # every image certain of its prototype
    assert method.warnings(healthy, now) == []
    assert "nearly equal" in method.warnings(healthy | {"feature_std": 1e-5}, now)[0]
    assert "one prototype" in method.warnings(healthy | {"prototype_entropy": 1e-4}, now)[0]
    assert (
        "uniform"
        in method.warnings(healthy | {"teacher_entropy": math.log(37), "prototype_entropy": math.log(37)}, now)[0]
    )


def test_collapse_of_a_run_is_detected(tiny_faces: Path, tmp_path: Path) -> None:
    """Without a moving centre and at a rate far too high, the teacher collapses to one prototype: log and events report it.

    The first step is not finite. It is skipped, and is not reported as a collapse.
    """
    from tests.runs import events, metrics, output, recipe_file, run

    path = recipe_file(
        tmp_path,
        tiny_faces / "train",
        data={"block": 8, "augmentation": "dino_faces_56"},
        backbone={"name": "fvit_tiny", "embedding_dim": 16, "image_size": 56, "overrides": PART},
        method=DINO | {"centre_momentum": 0.999999, "teacher_momentum": 0.5},
        phases=[{"name": "pretraining", "global_batch": 16, "micro_batches": 1}],
        optimizer={"lr": 0.02},
        schedule={"total": "60 steps", "warmup": "0 steps", "shape": "constant"},
        checkpoint={"every": "1000 steps"},
    )
    assert run(path, environment={"LVTRAIN_FAULT": "loop.outputs:*:0:nan"}) == 0, output(path)
    folder = tmp_path / "runs" / "tiny"
    rows = metrics(folder)
    assert rows[0]["nonfinite"] == 1 and rows[1]["feature_std"] > 1e-3 and rows[1]["prototype_entropy"] > 0.05, (
        "not from the start"
    )
    said = events(folder, "warning")
    assert said and all("collapse" in event["text"] and event["step"] > 2 for event in said), said
    assert "warning: collapse" in output(path)


# ------------------------------------------------------------------------------------------------------------------- LAFS


def view(landmarks: torch.Tensor, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = len(landmarks)
    options: dict[str, Any] = {
        "count": landmarks.shape[1],
        "shuffle": False,
        "perturbation": 0.0,
        "seed": 3,
        "purpose": "test",
        "step": 5,
    }
    options |= {"sample_ids": torch.arange(count)} | changes
    return landmark_view(torch.zeros(count, 3, 8, 8), landmarks, **options)


def test_limit_case_is_the_landmarks_themselves() -> None:
    landmarks = torch.rand(3, 16, 2) * 8
    _, points, positions = view(landmarks)
    assert torch.equal(points, landmarks) and torch.equal(positions, torch.arange(16).expand(3, 16))


def test_subset_keeps_positions_and_shuffle_permutes_landmarks_only() -> None:
    landmarks = torch.rand(4, 20, 2)
    _, points, positions = view(landmarks, count=7)
    for row in range(4):
        assert len(set(positions[row].tolist())) == 7
        assert torch.equal(points[row], landmarks[row, positions[row]])
    _, points, positions = view(landmarks, shuffle=True)
    assert torch.equal(positions, torch.arange(20).expand(4, 20))
    for row in range(4):
        assert not torch.equal(points[row], landmarks[row])
        assert torch.equal(points[row].sort(dim=0).values, landmarks[row].sort(dim=0).values)


def test_perturbation_is_normal_with_alpha() -> None:
    landmarks = torch.zeros(400, 50, 2, dtype=torch.float64)
    _, points, _ = view(landmarks, perturbation=2.0)
    assert float(points.mean()) == pytest.approx(0, abs=0.05) and float(points.std()) == pytest.approx(2, abs=0.05)
    assert float((points[..., 0] * points[..., 1]).mean()) == pytest.approx(0, abs=0.1)


def test_draws_belong_to_the_sample_not_to_its_place() -> None:
    landmarks = torch.rand(1, 16, 2).expand(6, 16, 2)
    ids = torch.tensor([9, 4, 7, 1, 3, 8])
    whole = view(landmarks, count=5, shuffle=True, perturbation=2.0, sample_ids=ids)
    part = view(landmarks[2:4], count=5, shuffle=True, perturbation=2.0, sample_ids=ids[2:4])
    assert torch.equal(whole[1][2:4], part[1]) and torch.equal(whole[2][2:4], part[2])
    assert not torch.equal(
        whole[2], view(landmarks, count=5, shuffle=True, perturbation=2.0, sample_ids=ids, step=6)[2]
    )


LAFS = DINO | {"name": "lafs", "landmarks": 5, "landmark_weights": "read by the trainer"}


def test_lafs_without_augmentation_is_dino_on_part_fvit() -> None:
    """All landmarks, alpha = 0, no shuffle, the landmark CNN seeing the views themselves: DINO's own loss."""
    plain = create_method(recipe(DINO), num_classes=4, device=CPU)
    ours = create_method(
        recipe(LAFS | {"landmarks": 16, "perturbation": 0, "shuffle": False}), num_classes=4, device=CPU
    )
    data = batch(4, local=32)
    data.views |= {f"{n}_landmarks": v for n, v in data.views.items() if not n.endswith("_landmarks")}
    now = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0)
    losses = []
    for method in (plain, ours):
        method.module.train()  # as the engine does; the frozen landmark CNN stays on its stored statistics
        method.begin_step(now, torch.arange(4))
        losses.append(method.loss(method.module(*method.inputs(data)), data, now).loss)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_lafs_views_are_what_the_settings_say() -> None:
    """Points come from the twins, whatever the colours of the views; both branches are perturbed by N(0, alpha) and shuffled, each in its own way."""
    now, data = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0), batch(4, local=32)

    def points(**settings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the landmark CNN, the student and the teacher on the global views, [2, 4, 16, 2]."""
        method = create_method(recipe(LAFS | {"landmarks": 16} | settings), num_classes=4, device=CPU)
        assert isinstance(method, DinoMethod)
        method.begin_step(now, torch.arange(4))
        branches = method.inputs(data)[:2], method.teacher_inputs(data, now)
        cnn = method.teacher.get_submodule("backbone").predict_landmarks  # type: ignore[operator]
        raw = torch.stack([cnn(data.views[f"global_{i}_landmarks"]) for i in (0, 1)])
        return raw, *(torch.stack([view[1] for view in views]) for views in branches)  # type: ignore[return-value]

    with torch.no_grad():
        raw, student, teacher = points(shuffle=False, perturbation=2.0)
        assert float((student - raw).std()) == pytest.approx(2, rel=0.15) == float((teacher - raw).std())
        assert float((student - teacher).std()) == pytest.approx(2 * 2**0.5, rel=0.15), "not the same noise twice"
        raw, student, teacher = points(shuffle=True, perturbation=0.0)
        for branch in (student, teacher):
            assert not torch.equal(branch, raw) and torch.equal(branch.sort(dim=2).values, raw.sort(dim=2).values)
        assert not torch.equal(student, teacher)
        data.views |= {name: 1 - view for name, view in data.views.items() if not name.endswith("_landmarks")}
        assert torch.equal(points(shuffle=True, perturbation=0.0)[1], student)


def test_lafs_trains_the_student_but_not_the_landmark_cnn() -> None:
    method = create_method(recipe(LAFS), num_classes=4, device=CPU)
    now = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0)
    data = batch(4, local=32)
    method.begin_step(now, torch.arange(4))
    inputs = method.inputs(data)
    assert all(points.shape == (4, 5, 2) for _, points, _ in inputs)
    assert all(points.shape == (4, 16, 2) for _, points, _ in method.teacher_inputs(data, now))
    method.loss(method.module(*inputs), data, now).loss.backward()
    gradients = {name: parameter.grad is not None for name, parameter in method.module.named_parameters()}
    assert not any(found for name, found in gradients.items() if ".stn." in name or "output_layer" in name)
    assert gradients["backbone.patch_to_embedding.weight"] and gradients["head.prototypes.weight"]


def test_lafs_needs_a_backbone_with_fixed_landmarks() -> None:
    with pytest.raises(UserError, match="part_fvit"):
        create_method(
            recipe(LAFS, backbone={"name": "fvit_tiny", "embedding_dim": 16, "image_size": 32, "overrides": PART}),
            num_classes=4,
            device=CPU,
        )
    with pytest.raises(UserError, match="freeze_landmarks"):
        create_method(
            recipe(LAFS, backbone={"name": "part_fvit_tiny", "embedding_dim": 16, "image_size": 32, "overrides": PART}),
            num_classes=4,
            device=CPU,
        )
    with pytest.raises(UserError, match=r"method\.landmark_weights"):
        create_method(recipe(LAFS | {"landmark_weights": None}), num_classes=4, device=CPU)


# ------------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(("option", "reaches"), [("fixed", False), ("trained", True), ("anchored", True)])
def test_gradients_reach_landmarks_as_the_option_says(option: str, reaches: bool) -> None:
    overrides = PART | ({"freeze_landmarks": True} if option == "fixed" else {})
    settings = recipe(
        {"name": "finetune", "landmarks": option, "beta": 0.5},
        backbone={"name": "part_fvit_tiny", "embedding_dim": 16, "image_size": 32, "overrides": overrides},
        init_from={"path": "read by the trainer"},
    )
    method = create_method(settings, num_classes=6, device=CPU)
    method.enter_phase(settings.phases[0], first_time=True)
    if option == "anchored":
        with torch.no_grad():
            method.evaluated().get_submodule("output_layer.1").weight.add_(0.01)
    now = StepInfo(step=0, lr=0.1, progress=0.0, epoch=0.0)
    data = Batch({"image": torch.rand(4, 3, 32, 32)}, torch.arange(4), torch.arange(4))
    method.begin_step(now, torch.arange(4))
    outputs = method.module(*method.inputs(data))
    output = method.loss(outputs, data, now)
    output.loss.backward(retain_graph=True)
    gradient = method.evaluated().get_submodule("output_layer.1").weight.grad
    assert (gradient is not None and float(gradient.abs().sum()) > 0) == reaches
    if option == "anchored":
        distance = output.metrics["landmark_distance"]
        assert float(distance) > 0
        anchor = method.anchor.predict_landmarks(data.images)  # type: ignore[attr-defined]
        points = method.evaluated().predict_landmarks(data.images)  # type: ignore[operator]
        assert float(distance) == pytest.approx(float((points - anchor).norm(dim=-1).mean()), rel=1e-5)
        method.settings = method.settings.model_copy(update={"beta": 0.0})  # type: ignore[attr-defined]
        classification = method.loss(outputs, data, now).loss
        assert float(output.loss - classification) == pytest.approx(0.5 * float(distance), rel=1e-4)


@pytest.mark.parametrize(
    ("option", "named"),
    [("trained", "freeze_landmarks"), ("anchored", "freeze_landmarks"), ("fixed", "landmark CNN")],
)
def test_landmark_options_that_cannot_be(option: str, named: str) -> None:
    """Trained although frozen, or anchored to points that were never trained."""
    with pytest.raises(UserError, match=named):
        create_method(recipe({"name": "finetune", "landmarks": option}), num_classes=6, device=CPU)


def lafs_run(folder: Path, data: Path) -> Path:
    from safetensors.torch import save_file

    from lvtrain.backbones import create_backbone
    from tests.runs import recipe_file

    torch.manual_seed(1)
    supervised = create_backbone("part_fvit_tiny", embedding_dim=16, image_size=32, **PART)
    folder.mkdir(parents=True)
    save_file(supervised.state_dict(), folder / "supervised.safetensors")
    return recipe_file(
        folder,
        data,
        data={"block": 8, "augmentation": "lafs"},
        backbone={
            "name": "part_fvit_tiny",
            "embedding_dim": 16,
            "image_size": 32,
            "overrides": PART | {"freeze_landmarks": True},
        },
        method={
            **{
                "name": "lafs",
                "prototypes": 31,
                "hidden": 16,
                "bottleneck": 8,
                "landmarks": 5,
                "freeze_last_layer": 0.05,
            },
            "landmark_weights": str(folder / "supervised.safetensors"),
        },
        phases=[{"name": "pretraining", "global_batch": 8, "micro_batches": 2}],
        optimizer={"weight_decay": 0.04, "weight_decay_end": 0.4},
        schedule={"total": "4 steps", "shape": "constant"},
        checkpoint={"every": "2 steps"},
    )


def test_selfsupervised_run_resumes_exactly_and_elastically(tiny_faces: Path, tmp_path: Path) -> None:
    """LAFS under ZeRO-3 on 2 ranks, stopped and started again, ends with the bits of an undisturbed run.

    Begun under ZeRO-2 on 2 ranks and resumed with 1 under ZeRO-1, it has the same losses, teacher and centre up to rounding.
    The prototypes move from the third step on.
    """
    from safetensors.torch import load_file

    from lvtrain.weights.source import open_source
    from tests.runs import metrics, output, run

    ends, losses = [], []
    for name, ranks, zero in (("whole", 2, 3), ("halves", 2, 3), ("elastic", 1, 1)):
        path = lafs_run(tmp_path / name, tiny_faces / "train")
        if name != "whole":
            assert run(path, "--max-time", "0.001", ranks=2, zero=3 if name == "halves" else 2) == 75, output(path)
        assert run(path, ranks=ranks, zero=zero) == 0, output(path)
        folder = tmp_path / name / "runs" / "tiny"
        half, end = (
            {
                k: v
                for file in (folder / "checkpoints" / f"step_00000000{step}").glob("*.safetensors")
                for k, v in load_file(file).items()
            }
            for step in (2, 4)
        )
        ends.append(end)
        moment = "backbone.exp_avg.head.prototypes.weight"
        assert not half[moment].any() and end[moment].any()
        losses.append([row["loss"] for row in metrics(folder)])
        assert [row["weight_decay"] for row in metrics(folder)] == pytest.approx([0.04, 0.0927, 0.22, 0.3473], abs=1e-4)
    whole, halves, elastic = ends
    assert whole.keys() == halves.keys() and any(name.startswith("teacher.") for name in whole)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert losses[2] == pytest.approx(losses[0], rel=5e-6) and len(losses[0]) == 4
    # fine-tuning and evaluation take the teacher, as LAFS's released train_largescale.py does
    taken = open_source(tmp_path / "whole" / "runs" / "tiny").state()
    assert all(torch.equal(value, whole[f"teacher.backbone.{name}"]) for name, value in taken.items())
    assert not torch.equal(taken["pos_embedding"], whole["backbone.param.backbone.pos_embedding"])
    for name in whole:
        if name.startswith(("teacher.", "dino.")):
            torch.testing.assert_close(elastic[name], whole[name], rtol=1e-4, atol=1e-6)
