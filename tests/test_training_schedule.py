"""Learning rate and phase ends, as tables: first and last step included."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lvtrain.engine.optimizers.adamw import AdamWSection
from lvtrain.engine.optimizers.sgd import SgdSection
from lvtrain.errors import UserError
from lvtrain.recipe.base import Duration
from lvtrain.recipe.optimizer import Optimizer
from lvtrain.recipe.sections import Phase, PhaseEnd, Schedule
from lvtrain.training.schedule import (
    CosineStage,
    LearningRate,
    Position,
    learning_rate,
    phase_end_reason,
    phase_limit,
    rate_line,
    what_is_complete,
)

PHASE = Phase(name="a", global_batch=10, micro_batches=2)


def rates(**fields) -> list[float]:
    rate = learning_rate(Schedule(**fields), AdamWSection(lr=1.0), phases=[PHASE], samples_per_epoch=20)
    return [round(rate.at(step * 10, 10), 6) for step in range(11)]


def test_polynomial_with_warmup() -> None:
    assert rates(total="10 steps", warmup="4 steps", shape="quadratic") == pytest.approx(
        [0.25, 0.5, 0.75, 1.0] + [(1 - k / 6) ** 2 for k in range(7)], abs=1e-6
    )


def test_cosine_ends_at_final() -> None:
    values = rates(total="5 epochs", shape="cosine", final=0.1)
    assert values[0] == 1.0 and values[5] == 0.55 and values[10] == pytest.approx(0.1)


def test_constant() -> None:
    assert rates(total="100 samples", shape="constant") == [1.0] * 11


def test_warmup_equals_torchs_linear_warmup() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    ours = learning_rate(
        Schedule(total="50 steps", warmup="5 steps", shape="constant"),
        AdamWSection(lr=1.0),
        phases=[PHASE],
        samples_per_epoch=20,
    )
    for step in range(8):
        assert ours.at(step * 10, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


def test_weight_decay_rises_as_dinos() -> None:
    """The table DINO's training reads at every iteration: final + (base - final) (1 + cos(pi i / n)) / 2."""
    optimizer = AdamWSection(weight_decay=0.04, weight_decay_end=0.4)
    table = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(80) / 80))
    assert [optimizer.weight_decay_at(step * 16 / 1280) for step in range(80)] == pytest.approx(
        table.tolist(), rel=1e-12
    )
    assert optimizer.weight_decay_at(1.0) == 0.4
    assert {AdamWSection(weight_decay=0.3).weight_decay_at(step / 7) for step in range(8)} == {0.3}, (
        "constant to the bit"
    )


def test_steps_are_refused_where_batches_differ() -> None:
    with pytest.raises(UserError, match="epochs or samples"):
        learning_rate(
            Schedule(total="10 steps"),
            AdamWSection(),
            phases=[PHASE, Phase(name="b", global_batch=20, micro_batches=2)],
            samples_per_epoch=20,
        )


def test_a_warmup_longer_than_the_whole_is_refused() -> None:
    def rate(total: str) -> LearningRate:
        schedule = Schedule(total=total, warmup="3 epochs")
        return learning_rate(schedule, AdamWSection(), phases=[PHASE], samples_per_epoch=20)

    assert rate("3 epochs").warmup == rate("6 steps").total == 60
    with pytest.raises(UserError, match=r"schedule\.warmup"):
        rate("5 steps")
    with pytest.raises(ValidationError, match="warmup"):
        rate("2 epochs")


@pytest.mark.parametrize(("section", "factor"), [(AdamWSection, 2.0), (SgdSection, 4.0)])
def test_the_rate_follows_the_batch_on_request(section: type[Optimizer], factor: float) -> None:
    """Square root for AdamW (Malladi et al. 2022), linear for SGD (Goyal et al. 2017); each phase by its own batch."""
    phases = [PHASE, Phase(name="b", global_batch=40, micro_batches=2)]
    fixed = section(lr=0.3)
    following = section(lr=0.3, lr_for_batch=10)
    assert [fixed.peak_for(batch) for batch in (10, 40)] == [0.3, 0.3]
    assert [following.peak_for(batch) for batch in (10, 40)] == pytest.approx([0.3, 0.3 * factor])
    rate = learning_rate(Schedule(total="2 epochs"), following, phases=phases, samples_per_epoch=200)
    assert rate.at(200, 40) / rate.at(200, 10) == pytest.approx(factor)
    line = rate_line(following, phases)
    assert f"{0.3 * factor:.4g} at global batch 40" in line and "0.3 at global batch 10" in line


def test_css_compares_the_mean_of_a_full_window() -> None:
    stage = CosineStage(0.5, window=4, device=torch.device("cpu"))
    lucky = [0.9, 0.1, 0.1, 0.1, 0.4, 0.6, 0.5, 0.6]
    assert [stage.observe(torch.tensor(value)) for value in lucky] == [False] * 7 + [True]
    assert stage.last_mean == pytest.approx(0.525)


def test_css_window_survives_a_restart_to_the_bit() -> None:
    values = torch.rand(23, generator=torch.Generator().manual_seed(0))
    whole = CosineStage(0.99, window=5, device=torch.device("cpu"))
    for value in values:
        whole.observe(value)
    first = CosineStage(0.99, window=5, device=torch.device("cpu"))
    for value in values[:13]:
        first.observe(value)
    second = CosineStage(0.99, window=5, device=torch.device("cpu"))
    second.load_state(first.state())
    for value in values[13:]:
        second.observe(value)
    assert second.state() == whole.state()


def test_why_a_phase_ends() -> None:
    phase = Phase(
        name="a",
        global_batch=10,
        micro_batches=2,
        end=PhaseEnd(at_most=Duration("3 steps"), until=Duration("70 samples")),
    )
    limit = phase_limit(phase, 20, total=200, samples_per_epoch=20)
    assert limit == 50
    at = {"limit": limit, "total": 200}
    assert phase_end_reason(40, **at, reached_delta=False) is None
    assert phase_end_reason(50, **at, reached_delta=False) == "length"
    assert phase_end_reason(30, **at, reached_delta=True) == "cos2"
    assert phase_end_reason(200, **at, reached_delta=False) == "schedule"
    assert phase_limit(phase, 60, total=200, samples_per_epoch=20) == 70


def test_what_is_complete() -> None:
    phases = [Phase(name=name, global_batch=4, micro_batches=1) for name in ("one", "two", "three")]
    ended = Position(step=10, samples_seen=40, phase_index=0, phase_over=True)
    early = what_is_complete(ended, phases, total=40)
    assert "schedule" in early and "two" in early and "three" in early
    at_end = what_is_complete(replace(ended, phase_index=2), phases, total=40)
    assert "schedule" in at_end and "three" not in at_end
    assert "schedule" not in what_is_complete(replace(ended, phase_index=2), phases, total=80)
    assert what_is_complete(replace(ended, phase_over=False), phases, total=80) is None
    assert what_is_complete(ended, phases, total=80, only_phase="two") is None
    assert what_is_complete(ended, phases, total=80, only_phase="one") == "phase one is complete"
    with pytest.raises(UserError, match=r"three.*two"):
        what_is_complete(ended, phases, total=80, only_phase="three")
