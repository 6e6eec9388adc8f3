"""Any key of a recipe with an extreme value: a dry run plans it, or refuses it in one line. Nothing crashes, nothing is unbounded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lvtrain.main import main
from lvtrain.recipe import files as recipes
from tests.conftest import ROOT

EXTREMES: list[Any] = [
    None, True, "", "x" * 300, "a\nb", "nan", "1e999 steps", "-3 epochs", "../../x", "ünï",
    [], [None], [[[]]], {}, {"a": 1}, -1, 0, -0.0, 1e-320, 1 << 31, 1 << 70, float("nan"), float("inf"),
]  # fmt: skip
SIZES = ["data.num_classes=1000", "data.num_samples=20000"]  # a dry run needs no data
RECIPES = {
    name: yaml.safe_load(recipes.dump(recipes.load(ROOT / "lvtrain" / "recipes" / f"{name}.yaml", SIZES)))
    for name in ("quickstart", "cluster_quickstart", "dino_quickstart")
}


def places(values: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and list element of a recipe, sections included."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*above, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*above, key))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_dry_run_answers_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject) -> None:
    values = copy.deepcopy(RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))])
    *parents, last = data.draw(st.sampled_from(list(places(values))))
    node: Any = values
    for key in parents:
        node = node[key]
    node[last] = data.draw(st.sampled_from(EXTREMES))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--ds_config", str(ROOT / "ds_configs" / "zero1.json")]
    code = main([*arguments, "--dry-run", "--ranks", "1"])
    errors = capsys.readouterr().err.splitlines()
    assert code == 0 or (code in (1, 2) and len(errors) == 1 and errors[0].startswith("lvtrain: error: ")), errors
