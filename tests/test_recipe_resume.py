"""Which keys of a recipe another start of the same run may change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lvtrain.errors import UserError
from lvtrain.recipe import files as recipes
from lvtrain.recipe.resume import resume_reason, resume_rule
from lvtrain.training.earlier_starts import compare

QUICKSTART = Path(recipes.__file__).parents[1] / "recipes" / "quickstart.yaml"
RULES = {
    "free": "runs data.path data.threads data.cache data.max_bad_fraction logging.every checkpoint.every "
    "evaluation.benchmarks.lfw safety.rollback method.distill.teacher",
    "reported": "optimizer.lr schedule.total schedule.warmup phases.1.end.cos2 "
    "backbone.compile backbone.checkpoint_blocks deterministic",
    "fixed": "seed name data.block data.augmentation data.backend backbone.name backbone.overrides.depth "
    "phases.0.global_batch phases.0.micro_batches phases.0.sample_rate phases.0.expectation phases.0.name "
    "method.window method.distill.weight optimizer.weight_decay optimizer.clip optimizer.layer_decay ema.decay init_from.path an.unknown.key",
}


@pytest.mark.parametrize(("rule", "key"), [(rule, key) for rule, keys in RULES.items() for key in keys.split()])
def test_the_rule_of_a_key(rule: str, key: str) -> None:
    assert resume_rule(key) == rule


def difference(*overrides: str) -> list[str]:
    before = recipes.load(QUICKSTART, ["init_from=a", "ema.decay=0.9"])
    now = recipes.load(QUICKSTART, ["init_from=a", "ema.decay=0.9", *overrides])
    return compare(yaml.safe_load(recipes.dump(before)), yaml.safe_load(recipes.dump(now)), "runs/x")


def test_free_changes_are_silent_and_others_are_reported() -> None:
    assert difference("logging.every=5", "data.threads=7", "evaluation.benchmarks={}") == []
    changed = difference("optimizer.lr=1e-4", "phases.0.end.at_most=200 steps", "logging.every=5")
    assert [line.partition(":")[0] for line in changed] == ["optimizer.lr", "phases.0.end.at_most"]


@pytest.mark.parametrize(
    "override", ["seed=3", "phases.0.sample_rate=0.1", "init_from=b", "backbone.overrides.depth=2"]
)
def test_a_fixed_key_is_refused_with_its_reason(override: str) -> None:
    key = "init_from.path" if override == "init_from=b" else override.partition("=")[0]
    with pytest.raises(UserError) as caught:
        difference(override, "optimizer.lr=1e-4")
    assert resume_reason(key)
    assert f"{key}: " in str(caught.value) and resume_reason(key) in str(caught.value)
    assert "optimizer.lr" not in str(caught.value)
