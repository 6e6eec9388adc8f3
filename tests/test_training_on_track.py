"""A run whose card says when its phases end: the expectation and the outcome are events of the run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import ROOT
from tests.runs import events, output, run
from tests.shard_data import jpeg, make_dataset


def test_each_phase_says_when_it_was_to_end_and_when_it_did(tmp_path: Path) -> None:
    # as many images and identities as the quick start has, because the card's curve is of these; the images are few
    few = [jpeg(number) for number in range(20)]
    data = make_dataset(tmp_path / "data", 12_000, 500, replaced={each: few[each % 20] for each in range(12_000)})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "lvtrain/recipes/quickstart.yaml").read_text())
    changes = [f"data.path={data}", f"runs={tmp_path / 'runs'}", "evaluation.benchmarks={}", "logging.trackers=[]"]
    changes += ["schedule={total: 3 steps, warmup: 1 steps}", "logging.every=1"]
    changes += [f"phases.{phase}.global_batch=8" for phase in range(3)]
    changes += [f"phases.{phase}.end.at_most=1 steps" for phase in range(2)]
    assert run(recipe, *changes) == 0, output(recipe)
    folder = tmp_path / "runs" / "quickstart"
    ends = json.loads((ROOT / "lvtrain/recipes/curves/quickstart.json").read_text())["phase_ends"]
    deltas = {"alignment": 0.2, "stabilisation": 0.35}
    expected = [(name, deltas[name], *ends[name]) for name in deltas]
    found = events(folder, "delta_expected")
    assert [(row["phase"], row["delta"], row["earliest"], row["latest"]) for row in found] == expected
    ended = [(row["phase"], row["reached"], row["stand"]) for row in events(folder, "delta")]
    assert ended == [("alignment", False, "earlier"), ("stabilisation", False, "earlier")]
