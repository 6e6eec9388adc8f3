"""The update of the rows on a second stream: nothing reads rows before it is done, and results do not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lvtrain.classifier import OptimizerSettings, ShardedClassifier
from lvtrain.classifier.margins import CosFace
from lvtrain.classifier.optimizer import SideStream
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.runs import recipe_file
from tools.trial import contents

CLASSES, DIM, BATCH = 53, 16, 12


class Late(SideStream):
    """A second stream at its slowest, on any device: the work begins only when it is waited for."""

    work: Callable[[], None] | None = None
    complete = False  # the rows' gradient

    def follow(self) -> None:
        self.complete = True

    def run(self, work: Callable[[], None], *reads: Any) -> None:
        self.join()
        assert self.complete and reads
        self.work, self.complete = work, False

    def join(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work()


def _steps(head: ShardedClassifier, device: str) -> list[torch.Tensor]:
    """What readers see: states after a step, losses, a method's own look at rows, an expectation bank started from them, state put back."""
    seen = []

    def look() -> dict[str, torch.Tensor]:
        state = {name: saved.tensor.detach().clone() for name, saved in head.state().items()}
        seen.extend(state.values())
        return state

    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> None:
        labels = torch.randperm(CLASSES, generator=generator)[
            :BATCH
        ]  # distinct: a GPU adds up those of one class in any order
        x = torch.randn(BATCH, DIM, generator=generator).to(device).requires_grad_()
        head.begin_step(number, labels)
        loss = head(x, labels.to(device), step=number).loss
        own = torch.arange(3, device=device) if head.chosen is None else head.chosen[:3]
        (loss + head.centres_of(own).square().sum()).backward()
        head.end_step(lr=0.05)
        seen.extend((loss.detach(), x.grad))

    kept = {}
    for number in range(6):
        step(number)
        if number == 1:
            head.enter_phase(sample_rate=1.0)
            kept = look()
        if number == 4:
            for name, tensor in head._saved().items():
                tensor.copy_(kept[name])
    head.begin_step(6, torch.arange(CLASSES))
    seen.append(head.centres_of(torch.arange(5, device=device)).detach().clone())
    look()
    return [tensor.cpu() for tensor in seen]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["dense", "row_sparse"])
def test_every_reader_waits_for_the_update(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def head() -> ShardedClassifier:
        optimizer = OptimizerSettings(mode=mode)  # type: ignore[arg-type]
        return ShardedClassifier(CLASSES, DIM, margin=CosFace(), optimizer=optimizer, sample_rate=0.4, device=device)

    at_once, aside = head(), head()
    at_once.side_stream._stream = None
    if device == "cpu":
        aside.side_stream = Late(torch.device("cpu"))
    expected = _steps(at_once, device)
    if device == "cuda":  # a slow second stream

        def slowly(*arguments: Any, step: Callable[..., None] = aside.optimizer.step, **options: Any) -> None:
            torch.cuda._sleep(20_000_000)
            step(*arguments, **options)

        monkeypatch.setattr(aside.optimizer, "step", slowly)
    for got, wanted in zip(_steps(aside, device), expected, strict=True):
        assert torch.equal(got, wanted)


def _trained(rank: int, world_size: int, recipe: str, name: str) -> None:
    from lvtrain import main
    from lvtrain.classifier import sharded

    if name == "late":
        sharded.SideStream = Late  # type: ignore[misc]
    arguments = ["--recipe", recipe, "--ds_config", str(ROOT / "ds_configs" / "zero1.json"), f"name={name}"]
    assert main.main(arguments) == 0


def test_training_with_the_slowest_update_leaves_the_same_checkpoint(tiny_faces: Path, tmp_path: Path) -> None:
    """PCO's three phases through the front door, each built from the checkpoint of the one before: equal bit for bit."""
    recipe = str(recipe_file(tmp_path, tiny_faces / "train"))
    for name in ("at_once", "late"):
        run_ranks(1, _trained, recipe, name)
    at_once, late = (contents(tmp_path / "runs" / name) for name in ("at_once", "late"))
    assert "classifier.exp_avg" in late and late == at_once
