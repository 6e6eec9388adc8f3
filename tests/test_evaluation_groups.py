"""Error rates by group: counts against plain loops, and intervals that hold as often as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest, norm
from scipy.stats import t as student

from lvtrain.distributed.world import World
from lvtrain.errors import UserError
from lvtrain.evaluation import allpairs, group_files, suite
from lvtrain.evaluation.bins import write_bin
from lvtrain.evaluation.protocol import PROTOCOLS
from lvtrain.evaluation.scores import groups, intervals
from lvtrain.weights import extract
from tests.ranks import run_ranks
from tests.runs import tool

Population = tuple[np.ndarray, np.ndarray]


def population(seed: int, identities: int, images: int, spread: float = 0.6) -> Population:
    """Unit rows: identities differ in how sure they are, and share a direction, so their comparisons depend on each other."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(identities, 16)) * np.exp(0.15 * rng.normal(size=(identities, 1))) + 0.8 * np.eye(16)[0]
    labels = np.repeat(np.arange(identities), images)
    noise = rng.normal(size=(len(labels), 16)) * np.exp(0.3 * rng.normal(size=identities))[labels, None]
    rows = centres[labels] + spread * noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def comparisons(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    first, second = np.triu_indices(len(rows), 1)
    return (rows @ rows.T)[first, second], labels[first] == labels[second], first, second


def by_loops(rows: np.ndarray, labels: np.ndarray, of: dict[int, str], threshold: float) -> dict[str, dict[str, float]]:
    """Rates, and the variance of the error counts from every two comparisons that share an identity."""
    found: dict[str, dict[str, float]] = {}
    cosines = rows @ rows.T
    for name in sorted(set(of.values())):
        for kind in ("fmr", "fnmr"):
            dyads: dict[tuple[int, int], list[bool]] = {}
            for i in range(len(rows)):
                for j in range(i + 1, len(rows)):
                    a, b = int(labels[i]), int(labels[j])
                    if of.get(a) == name == of.get(b) and (a == b) == (kind == "fnmr"):
                        dyads.setdefault((a, b), []).append(bool(cosines[i, j] >= threshold) == (kind == "fmr"))
            count = sum(map(len, dyads.values()))
            rate = sum(map(sum, dyads.values())) / count
            excess = {dyad: sum(each) - rate * len(each) for dyad, each in dyads.items()}
            plain = sum(excess[d] * excess[e] for d in excess for e in excess if set(d) & set(e))
            found.setdefault(name, {}).update({kind: rate, f"{kind}_count": count, f"{kind}_plain": plain})
    return found


def sample() -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    rng = np.random.default_rng(3)
    rows, _ = population(1, 24, 1, spread=0.0)
    labels = rng.integers(0, 24, 90) * 3  # several sizes, in no order, with gaps
    rows = rows[labels // 3] + 0.25 * rng.normal(size=(90, 16))
    of = {3 * i: "ABC"[i % 3] for i in range(22)}  # two identities have no group
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels, of


def check_counts(found: dict[str, Any], rows: np.ndarray, labels: np.ndarray, of: dict[int, str]) -> None:
    for one in found["at"].values():
        expected = by_loops(rows, labels, of, one["threshold"])
        assert set(one["by_group"]) == set("ABC")
        for name, rates in expected.items():
            got = one["by_group"][name]
            assert (got["impostor_comparisons"], got["genuine_comparisons"]) == (
                rates["fmr_count"],
                rates["fnmr_count"],
            )
            for kind in ("fmr", "fnmr"):
                assert got[kind] == pytest.approx(rates[kind], abs=1e-12)
                assert got[f"{kind}_low"] <= got[kind] <= got[f"{kind}_high"]
        for kind in ("fmr", "fnmr"):
            every = [rates[kind] for rates in expected.values()]
            between = one[kind]
            assert between["difference"] == pytest.approx(max(every) - min(every), abs=1e-12)
            assert between["difference_low"] <= between["difference"] <= between["difference_high"]
            if min(every) > 0:
                assert between["ratio"] == pytest.approx(max(every) / min(every))
                assert between["worst_to_geometric_mean"] == pytest.approx(max(every) / np.prod(every) ** (1 / 3))
            else:
                assert between["ratio"] is None and between["worst_to_geometric_mean"] is None


def test_counts_are_those_of_loops() -> None:
    rows, labels, of = sample()
    cosines, issame, first, second = comparisons(rows, labels)
    pairs = groups.Pairs(cosines, issame, first, second)
    assert len(np.unique(pairs.identities())) == len(np.unique(labels))
    assert all(len(set(pairs.identities()[labels == label])) == 1 for label in labels)
    of_items = np.array([of.get(int(label)) for label in labels], dtype=object)
    listed = groups.of_pairs(pairs, of_items, pairs.identities())
    assert set(listed["at"]) == {"1e-01", "1e-02", "1e-03"}  # about 3,800 impostor comparisons resolve no lower FMR
    check_counts(listed, rows, labels, of)
    for target, one in listed["at"].items():
        impostors = cosines[~issame]
        assert (impostors >= one["threshold"]).mean() <= float(target)
        assert (impostors >= impostors[impostors < one["threshold"]].max()).mean() > float(target)


def on_ranks(rank: int, size: int) -> dict[str, Any]:
    rows, labels, of = sample()
    groups._TILE = 7  # many tiles
    at = {"1e-01": 0.4, "1e-02": 0.63}
    return groups.of_identities(rows, labels, of, at, world=World(rank, size, rank, torch.device("cpu")))


def test_all_pairs_by_tiles_on_two_ranks_are_the_list_of_pairs() -> None:
    rows, labels, of = sample()
    at = {"1e-01": 0.4, "1e-02": 0.63}
    found = groups.of_identities(rows, labels, of, at)
    check_counts(found, rows, labels, of)
    cosines, issame, first, second = comparisons(rows, labels)
    of_items = np.array([of.get(int(label)) for label in labels], dtype=object)
    listed = groups.of_pairs(groups.Pairs(cosines, issame, first, second), of_items, labels, at)
    for target in at:
        for name, one in listed["at"][target]["by_group"].items():
            assert found["at"][target]["by_group"][name] == pytest.approx(one, abs=1e-9)
    assert found["without_group"] == 2
    for ranks in run_ranks(2, on_ranks):
        assert json.dumps(ranks) == json.dumps(found)


def test_variance_is_the_sum_over_comparisons_that_share_an_identity() -> None:
    rows, labels, of = sample()
    cosines, issame, first, second = comparisons(rows, labels)
    expected = by_loops(rows, labels, of, 0.4)
    for kind, part, independent in (("fmr", ~issame, 2), ("fnmr", issame, 1)):
        chosen = part & np.array(
            [of.get(int(a)) == "A" == of.get(int(b)) for a, b in zip(labels[first], labels[second])]
        )
        wrong = (cosines[chosen] >= 0.4) == (kind == "fmr")
        tally = intervals.Dyads(labels[first[chosen]], labels[second[chosen]]).tally(wrong)
        n = tally.identities
        correction = n * (n - 1) / ((n - 2) * (n - 3)) if kind == "fmr" else n / (n - 1)
        assert tally.variance == pytest.approx(correction * max(0.0, expected["A"][f"{kind}_plain"]))
        assert tally.independent == n // independent


def test_interval_of_independent_comparisons_is_wilsons() -> None:
    expected = binomtest(3, 50).proportion_ci(0.95, method="wilson")
    assert intervals.wilson(3 / 50, 50, norm.ppf(0.975)) == pytest.approx(tuple(expected), abs=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Three groups of equal true rates, which 2,400 identities give. As if comparisons were independent, the interval is far too narrow."""
    threshold = 0.6
    many = [comparisons(*population(9_000 + k, 600, 2)) for k in range(4)]
    truth = {
        "fmr": np.mean([(cosines[~issame] >= threshold).mean() for cosines, issame, _, _ in many]),
        "fnmr": np.mean([(cosines[issame] < threshold).mean() for cosines, issame, _, _ in many]),
    }
    inside = {"fmr": 0, "fnmr": 0, "fmr if independent": 0, "fmr ratio": 0, "fnmr ratio": 0, "fmr difference": 0}
    tests = 120
    for test in range(tests):
        parts = [population(3 * test + k, 40, 3) for k in range(3)]
        rows = np.concatenate([part[0] for part in parts])
        labels = np.concatenate([part[1] + 40 * k for k, part in enumerate(parts)])
        of = {label: "ABC"[label // 40] for label in range(120)}
        one = groups.of_identities(rows, labels, of, {"x": threshold})["at"]["x"]
        for kind in ("fmr", "fnmr"):
            for rates in one["by_group"].values():
                inside[kind] += rates[f"{kind}_low"] <= truth[kind] <= rates[f"{kind}_high"]
            inside[f"{kind} ratio"] += one[kind]["ratio_low"] == 1.0
        inside["fmr difference"] += one["fmr"]["difference_low"] == 0.0
        for rates in one["by_group"].values():
            low, high = intervals.wilson(rates["fmr"], rates["impostor_comparisons"], 1.96)
            inside["fmr if independent"] += low <= truth["fmr"] <= high
    shares = {
        name: count / tests / (3 if name in ("fmr", "fnmr", "fmr if independent") else 1)
        for name, count in inside.items()
    }
    assert 0.925 <= shares["fmr"] <= 1 and 0.925 <= shares["fnmr"] <= 1, shares  # 95% is meant; 360 intervals
    assert min(shares["fmr ratio"], shares["fnmr ratio"], shares["fmr difference"]) >= 0.94, (
        shares
    )  # the true ratio is 1
    assert shares["fmr if independent"] < 0.85, shares


def test_rates_of_zero_keep_an_honest_interval() -> None:
    ends = np.arange(40)
    tally = intervals.Dyads(ends, ends).tally(np.zeros(40, bool))
    low, high = tally.interval(0.95)
    assert low == 0 and 3 / 40 < high < 0.12  # the rule of three and more
    apart = intervals.Dyads(*np.triu_indices(40, 1)).tally(np.zeros(780, bool))
    assert apart.independent == 20 and apart.interval(0.95)[1] > 3 / 20
    # with another group's design effect it is that of 780 / 2 comparisons
    assert apart.interval(0.95, together=2.0) == intervals.wilson(0, 390, student.ppf(0.975, 39))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 identities in folders with four images each; the odd ones are noisier. pairs.bin holds pairs of them."""
    folder = tmp_path_factory.mktemp("groups")
    rng = np.random.default_rng(0)
    for identity in range(24):
        face = rng.integers(0, 256, (7, 7, 3))
        (folder / "faces" / f"p{identity:02}").mkdir(parents=True)
        for image in range(4):
            noisy = np.clip(face + rng.normal(0, 90 if identity % 2 else 20, face.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((32, 32)).save(folder / "faces" / f"p{identity:02}" / f"{image}.png")
    lines = [f"p{identity:02},{'noisy' if identity % 2 else 'clear'}" for identity in range(24)]
    (folder / "groups.csv").write_text("\n".join(["identity,group", *lines]) + "\n")
    return folder


def test_the_tool_writes_rates_by_group(faces: Path, tmp_path: Path) -> None:
    files = sorted((faces / "faces").rglob("*.png"))
    chosen, issame = [], []
    for fold in range(10):
        for k in range(24):
            other = k if k % 4 < 2 else (k + 2 + 2 * (fold % 5)) % 24
            chosen += [files[4 * k + fold % 4], files[4 * other + (fold + 1) % 4]]
            issame.append(other == k)
    write_bin(tmp_path / "pairs.bin", [file.read_bytes() for file in chosen], issame)
    rows = [f"{i},{'noisy' if int(file.parent.name[1:]) % 2 else 'clear'}" for i, file in enumerate(chosen)]
    (tmp_path / "images.csv").write_text("\ufeffimage, group\n" + "\n".join(rows) + "\n")
    done = tool(
        "evaluate", "raw_pixels", "--cpu", "-b", f"all:{faces / 'faces'}", "--groups", faces / "groups.csv", "-o", tmp_path / "out"
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())["benchmarks"]
    tasks = suite.with_groups([suite.parse(f"pairs:{tmp_path / 'pairs.bin'}")], [f"pairs:{tmp_path / 'images.csv'}"])
    setting = extract.Setting(World(0, 1, 0, torch.device("cpu")), "cpu", 16, 32)
    results |= suite.evaluate(extract.raw_pixels, tasks, setting)
    # only half of the identities have genuine pairs in the .bin file: of the others, nothing says which images belong together
    for name, identities in (("all", 12), ("pairs", 6 + 6 * 4)):
        at = results[name]["groups"]["at"]
        assert set(at) == set(results[name]["tar_at_far"]), "the FMRs that the pairs resolve, and no others"
        for one in at.values():
            assert set(one["by_group"]) == {"noisy", "clear"}
            assert one["by_group"]["noisy"]["fnmr"] >= one["by_group"]["clear"]["fnmr"]
            assert {rates["identities"] for rates in one["by_group"].values()} == {identities}
    for plot in ("groups_fmr", "groups_fnmr", "discard"):
        with Image.open(tmp_path / "out" / f"all_{plot}.png") as image:
            assert image.size[0] > 300
    assert "noisy" in done.stdout and "ratio" in done.stdout
    assert PROTOCOLS.get("verification").rows(results["pairs"])[0]["group"] == "clear"


def test_wrong_tables_are_named(faces: Path, tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    for text, message in {
        "image,group\n0,a\n": "columns identity,group",
        "identity,group\np00,\n": "line 2",
        "identity,group\np00,a\np00,b\n": "two groups",
        "identity,group\nxx,a\n": "none of its 1 names",
        "identity,group,group\np00,a,b\n": "columns identity,group",
        'identity,group\n"p00,a\np01,b\n': "cannot be read",  # one field to the end of the file
    }.items():
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            group_files.groups_of(table, "identity", ["p00", "p01"])
    table.write_text("identity,group\np00,a\np01,a\n")
    attempts = {
        "two are needed": [f"x:{faces / 'faces'}", str(table)],
        "does not exist": [f"x:{faces / 'faces'}", "nowhere.csv"],
        "with groups": [f"x:clustering:{faces / 'faces'}", str(table)],
    }
    for message, (benchmark, given) in attempts.items():
        failed = tool("evaluate", "raw_pixels", "--cpu", "-b", benchmark, "--groups", given, "-o", tmp_path / "out")
        assert failed.exit_code == 2 and message in failed.stderr, failed.stderr


def test_thresholds_are_those_of_all_pairs() -> None:
    rows, labels, _ = sample()
    result = allpairs.all_pairs(rows, labels)
    at = {far: one["threshold"] for far, one in result["tar_at_far"].items()}
    cosines, issame, _, _ = comparisons(rows, labels)
    exact = groups.thresholds(cosines, issame)
    for far, threshold in exact.items():
        assert at[far] == pytest.approx(threshold, abs=2 * result["score_resolution"])
