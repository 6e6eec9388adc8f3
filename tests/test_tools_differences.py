"""Differences between the settings of a study: which runs are compared, and their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from lvtrain.errors import UserError
from tools.studies.differences import difference, interval, main, table

TAR = "TAR@FAR=1e-02 %"


def row(
    setting: str, values: list[float], seeds: list[int], pretrainings: list[int] | None = None, **place: Any
) -> dict[str, Any]:
    kinds = {} if pretrainings is None else {"pretraining_seeds": pretrainings}
    return {"setting": setting, "seeds": seeds, **kinds, **place, "figures": {TAR: {"values": values}}}


def test_runs_of_one_pretraining_and_one_seed_are_compared() -> None:
    tuned = row("tuned", [1.0, 2.0, 3.0, 4.0], [0, 1, 0, 1], [0, 0, 1, 1])
    other = row("other", [40.0, 30.0, 20.0, 10.0], [1, 0, 1, 0], [1, 1, 0, 0])
    scratch = row("scratch", [100.0, 200.0], [0, 1])
    assert difference(tuned, other, TAR).tolist() == [[-9.0, -18.0], [-27.0, -36.0]]
    assert difference(tuned, scratch, TAR).tolist() == [[-99.0, -198.0], [-97.0, -196.0]]
    assert difference(scratch, tuned, TAR).tolist() == [[99.0, 198.0], [97.0, 196.0]]


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 7)])
def test_one_factor_has_students_interval(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    expected = ttest_1samp(values.ravel(), 0).confidence_interval(0.95)
    mean, half = interval(values)
    np.testing.assert_allclose([mean - half, mean + half], [expected.low, expected.high], rtol=1e-12)


@pytest.mark.parametrize("spread", [(1, 1, 1), (3, 0.3, 0.1), (0, 2, 0.5), (1, 0, 0), (0, 0, 1)])
def test_two_factors_cover_the_truth_at_least_as_often_as_said(spread: tuple[float, float, float]) -> None:
    draw, hits, trials = np.random.default_rng(1), 0, 4000
    for _ in range(trials):
        kinds, seeds, rest = (draw.normal(size=shape) for shape in ((3, 1), (1, 3), (3, 3)))
        mean, half = interval(spread[0] * kinds + spread[1] * seeds + spread[2] * rest)
        hits += abs(mean) <= half
    assert hits / trials > 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5


def test_one_run_has_no_interval() -> None:
    mean, half = interval(np.array([[2.5]]))
    assert mean == 2.5 and np.isnan(half)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    assert interval(np.full((3, 3), 2.0)) == (2.0, 0.0)


def test_each_subset_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("frozen", [5.0], [0])]
    for fraction, shots, shift in ((0.1, 1, 1.0), (0.1, 2, 2.0), (1.0, 1, -3.0)):
        rows += [row("a", [10 + shift, 10 + shift], [0, 1], fraction=fraction, shots=shots)]
        rows += [row("b", [10.0, 10.0], [0, 1], fraction=fraction, shots=shots)]
    path = tmp_path / "study.json"
    for content in (rows, {"study": rows}):
        path.write_text(json.dumps(content))
        assert main([str(path), "a - b"]) == 0
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
        assert cells[0] == [f"difference, {TAR}", "10%, 1", "10%, 2", "100%, 1"]
        assert [float(cell.split()[0]) for cell in cells[2][1:]] == [1.0, 2.0, -3.0]


@pytest.mark.parametrize(
    ("second", "pair", "figure"),
    [
        (row("b", [1.0, 2.0], [0, 1]), "a - c", "TAR"),
        (row("b", [1.0, 2.0], [0, 1]), "a", "TAR"),
        (row("b", [1.0, 2.0], [0, 1]), "a - b", "accuracy"),
        (row("b", [1.0, 2.0], [0, 2]), "a - b", "TAR"),
        (row("b", [1.0, 2.0, 3.0], [0, 1, 0], [0, 0, 1]), "a - b", "TAR"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(second: dict[str, Any], pair: str, figure: str) -> None:
    with pytest.raises(UserError):
        table([row("a", [1.0, 2.0], [0, 1]), second], [pair], figure)


@pytest.mark.parametrize("content", [None, "", "{", "3", "{}", '{"study": 3}', '[{"setting": "a"}]', '["a"]'])
def test_a_file_without_a_study_is_refused_in_one_line(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(path), "a - b"])
    assert stop.value.code and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_rows_without_a_subset_can_be_compared_too_and_one_run_has_its_mean_alone() -> None:
    rows = [row("a (frozen)", [3.0], [0]), row("b (frozen)", [1.0], [0]), row("c", [1.0], [0], fraction=0.1, shots=1)]
    line = table(rows, ["a (frozen) - b (frozen)"], "TAR").splitlines()[2]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["a (frozen) - b (frozen)", "+2.00"]


def test_a_whole_title_is_preferred_to_the_beginning_of_another() -> None:
    rows = [row(name, [1.0], [0]) for name in "ab"]
    for it, value in zip(rows, (5.0, 2.0), strict=True):
        it["figures"]["TAR"] = {"values": [value]}
    assert "+3.00" in table(rows, ["a - b"], "TAR")
    with pytest.raises(UserError, match="TAR@FAR=1e-02 %"):
        table(rows, ["a - b"], "TA")
