"""Cost of the cluster paper's settings: time of a step against plain ArcFace. All settings take turns in one process.

    python tools/benchmark.py cluster                                              # the steps of the ablation
    python tools/benchmark.py cluster --head --classes 20000 --dim 512 --batch 256    # without the backbone

`arcface` is the method `pco` with one phase, which has no bank. `baseline` is the cluster method with all its terms off.
A step is everything but the data: forward, losses, backward, and the updates of backbone, class centres and bank.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lvtrain.methods import StepInfo, create_method
from lvtrain.methods.cluster import ClusterMethod
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from tools.benchmarks.measure import Clock, describe, median, pick_device
from tools.studies.definition import read
from tools.studies.grid import ROOT

STUDY = read(ROOT / "tools" / "studies" / "cluster.yaml")
RECIPE = ROOT / STUDY.recipe
SMALL: dict[str, Any] = {"batch": 16, "classes": 200, "rounds": 2}


def run(
    batch: int = 0,
    classes: int = 800,
    dim: int = 0,
    rate: float = 1.0,
    rounds: int = 15,
    head: bool = False,
    settings: str = "",
    device: str = "auto",
) -> dict[str, Any]:
    """Milliseconds of each setting. batch, dim: 0 = the recipe's (cluster_ablation.yaml). head: no backbone runs.

    settings: of tools/studies/cluster.yaml, with commas between; empty for all.
    """
    place = pick_device(device)
    base = [f"phases.0.sample_rate={rate}", "method.warmup=0 steps"]
    base += [f"phases.0.global_batch={batch}"] * bool(batch) + [f"backbone.embedding_dim={dim}"] * bool(dim)
    steps = {
        name: _Step(recipes.load(RECIPE, [*base, *STUDY.overrides(name)]), classes, head, place)
        for name in (settings.split(",") if settings else STUDY.settings)
    }
    plain = recipes.load(RECIPE, base).model_dump(mode="json") | {"method": {"name": "pco"}}
    steps = {"arcface": _Step(recipes.resolve(plain), classes, head, place), **steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            clock = Clock(place)
            clock.mark("start")
            step(number)
            clock.mark("step")
            if number:
                seconds[name].append(clock.seconds()["step"])
    first = steps["arcface"]
    return {
        "subject": "cluster",
        "device": describe(place),
        "batch": first.batch,
        "classes": classes,
        "dim": first.dim,
        "sample_rate": rate,
        "head": head,
        "settings": {
            name: {
                "ms": round(1e3 * median(found), 2),
                # a ratio of each round, so that other load on the machine affects both
                "times_arcface": round(median([a / b for a, b in zip(found, seconds["arcface"])]), 3),
            }
            for name, found in seconds.items()
        },
    }


class _Step:
    def __init__(self, recipe: Recipe, classes: int, head: bool, device: torch.device) -> None:
        phase = recipe.phases[0]
        self.batch, self.dim, self.head = phase.global_batch, recipe.backbone.embedding_dim, head
        self.method: Any = create_method(recipe, num_classes=classes, device=device)
        self.method.enter_phase(phase, first_time=True)
        if isinstance(self.method, ClusterMethod):  # a bank that knows every class, as after its warm-up
            bank = self.method.bank
            bank.start_from(self.method.classifier.weight)
            bank.count.fill_(bank.window)
            bank.mean_distance.uniform_(0.5, 1.2)
        module = self.method.module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        side = recipe.backbone.image_size
        self.images = torch.randn(self.batch, 3, side, side, generator=generator).to(device)
        self.embeddings = torch.randn(self.batch, self.dim, generator=generator).to(device)
        self.labels = torch.randint(0, classes, (self.batch,), generator=generator)
        self.on_device = SimpleNamespace(images=self.images, labels=self.labels.to(device))
        module.train()

    def __call__(self, number: int) -> None:
        now = StepInfo(number, 1e-4, 0.0, 99.0)
        self.method.begin_step(now, self.labels)
        if self.head:
            outputs: Any = self.embeddings.clone().requires_grad_()
            if getattr(self.method, "learnable", False):
                outputs = (outputs, torch.exp(-self.method.module.log_temperature))
        else:
            outputs = self.method.module(self.images)
        self.method.loss(outputs, self.on_device, now).loss.backward()
        if not self.head:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.end_step(now, None)
