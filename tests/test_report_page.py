"""The report of a realistic run, of a young run and of a broken-off one: one file, nothing fetched, the figures of the files in it."""

import html.parser
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lvtrain.data import SampleOrder
from lvtrain.data.epochs import EpochTally, counts
from lvtrain.errors import UserError
from lvtrain.evaluation import verification
from lvtrain.planning.device import device
from lvtrain.planning.phases import plan_phases
from lvtrain.recipe import files as recipes
from lvtrain.report import facts, write_report
from lvtrain.report.figures import POINTS
from lvtrain.report.files import read_run

RECIPE = """\
name: sample
data: {path: data/quickstart/train}
backbone: {name: vit_nano, embedding_dim: 128}
method: {name: pco}
phases:
- {name: alignment, global_batch: 128, micro_batches: 4, sample_rate: 0.5, expectation: 'off', end: {cos2: 0.2}}
- {name: stabilisation, global_batch: 128, micro_batches: 4, sample_rate: 0.5, expectation: update, end: {cos2: 0.35}}
- {name: refinement, global_batch: 128, micro_batches: 4, sample_rate: 1.0, expectation: frozen, end: {}}
"""


def benchmark(separation: float, seed: int, pairs: int = 3000) -> dict:
    generator = np.random.default_rng(seed)
    issame = np.arange(pairs) % 2 == 0
    cosines = np.clip(generator.normal(np.where(issame, separation, 0.05), 0.12), -1, 1)
    return {**verification.summary(2 - 2 * cosines, issame), "xnorm": 11.3}


def make_run(folder: Path, steps: int = 600, every: int = 10, resumed: bool = True) -> Path:
    """A run folder as the quick start leaves it, its curves shaped like a real one's."""
    generator = np.random.default_rng(0)
    (folder / "evaluation").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    environment = {
        "python": "3.11.2",
        "world_size": 2,
        "gpus": [],
        "packages": {"torch": "2.15.0", "deepspeed": "0.19.8"},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    start = 1_795_000_000.0
    ends = [0.37 * steps, 0.52 * steps, steps]
    names = ["alignment", "stabilisation", "refinement"]
    rows = []
    for step in range(every, steps + 1, every):
        share = step / steps
        cos2 = 0.42 / (1 + np.exp(-9 * (share - 0.42))) + 0.01 * generator.normal() * share
        rows.append(
            {
                "time": start + 0.51 * step,
                "step": step,
                "samples_seen": step * 128,
                "epoch": round(step * 128 / 8000, 4),
                "phase": names[int(np.searchsorted(ends, step))],
                "loss": 33 * np.exp(-3.2 * share) + 2 + 0.6 * generator.normal(),
                "cos2": float(abs(cos2)),
                "cos2_window": float(abs(cos2)),
                "lr": 1e-3 * min(1, step / 50) * (1 - share),
                "grad_norm": float(4 + generator.gamma(2.0)),
                "images_per_second": 250 + 6 * generator.normal(),
                "data_wait": float(abs(0.02 + 0.006 * generator.normal())),
                "nonfinite": 0,
                "memory_gb": None,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    events = [{"time": start, "event": "start", "step": 0, "samples_seen": 0, "world_size": 2, "attempt": 1}]
    previous = 0
    for name, end, reason in zip(names, ends, ["cos2", "cos2", "schedule"]):
        at = {"phase": name, "samples_seen": int(end) * 128}
        events.append({"time": start + previous, "event": "phase_start", "step": previous, "world_size": 2, **at})
        if resumed and name == "stabilisation":
            events.append({"time": start + end - 3, "event": "stop", "step": int(end) - 20, "reason": "SIGTERM", **at})
            events.append({"time": start + end, "event": "resume", "step": int(end) - 20, "attempt": 2, **at})
        ended = {"step": int(end), "reason": reason, "cos2_window": 0.2013}
        events.append({"time": start + end, "event": "phase_end", **ended, **at})
        saved = {"step": int(end), "reason": "phase_end", "stall_seconds": 0.113}
        events.append({"time": start + end, "event": "checkpoint", **saved, **at})
        previous = int(end)
    events.append(
        {"time": start + 400, "event": "done", "step": steps, "phase": None, "reason": "the schedule is complete"}
    )
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for name, step, separation in (
        ("before", 0, 0.09),
        (f"step_{int(ends[0]):09d}", int(ends[0]), 0.4),
        ("final", steps, 0.62),
    ):
        evaluation = {"step": step, "samples_seen": step * 128, "phase": "refinement"}
        evaluation["benchmarks"] = {"heldout": benchmark(separation, step)}
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(evaluation))
    return folder


class Links(html.parser.HTMLParser):
    """Collects everything a browser would fetch, and the tags left open."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object"):
            self.fetched.append(tag)
        self.fetched += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text()
    page = Links()
    page.feed(text)
    assert page.fetched == [] and page.open == []
    assert "url(http" not in text and "@import" not in text
    assert not re.search(r"#01010\d", text), "a colour of a figure was not given to the page's palette"

    final = json.loads((run / "evaluation" / "final.json").read_text())["benchmarks"]["heldout"]
    assert f"{100 * final['accuracy']:.2f}%" in text
    assert "before training" in text and "after training" in text
    assert "δ1 = 0.2" in text and "δ2 = 0.35" in text
    assert text.count("cosine stage scheduler") == 2
    assert "in 2 starts" in text and "median of the log lines, " in text
    assert "expectation: frozen" in text  # the recipe, folded
    assert text.count("<svg") == 6 + 4
    assert write_report(run).read_text() == text, "the same run gives the same file"


def test_report_of_a_young_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert "running" in write_report(tmp_path, tmp_path / "elsewhere" / "r.html").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 30.0, "time": 1.0}\n{"step": 20, "lo')
    events = [{"event": "start", "step": 0}, {"event": "warning", "step": 9, "text": "not learning"}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events))
    assert '<td class="wide quiet">not learning</td>' in write_report(tmp_path).read_text()
    assert "30.000" in write_report(tmp_path).read_text()


def test_epochs_that_counted_alike_are_one_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    tally = EpochTally(SampleOrder(100, 0), 0, 1, 0)
    for epoch in range(5):
        ids = tally.order.at(range(100 * epoch, 100 * epoch + 100))
        tally.add(100 * epoch, ids if epoch != 3 else np.zeros_like(ids))
    found = counts([ended], 100) if (ended := tally.ended(500)) else []
    again = [found[1], *found]  # after a resume an epoch may be counted once more
    with open(run / "events.jsonl", "a") as file:
        file.writelines(json.dumps({"time": 1.8e9, "event": "epoch", "step": 1, **asdict(one)}) + "\n" for one in again)
    text = write_report(run).read_text()
    table = text[text.index("<h2>Epochs</h2>") :].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[:5] for row in rows] == [
        ["1 to 3", "yes", "100", "100", "100"],
        ["4", "NO", "100", "100", ""],
        ["5", "yes", "100", "100", "100"],
    ]


def test_report_stays_small_for_a_long_run(tmp_path: Path) -> None:
    """A hundred thousand rows are drawn as at most POINTS of mean, lowest and highest."""
    run = make_run(tmp_path / "run", steps=200_000, every=2)
    with open(run / "events.jsonl", "a") as file:
        for step in range(500):
            file.write(json.dumps({"time": 1.8e9, "event": "checkpoint", "step": step, "phase": "refinement"}) + "\n")
            file.write(json.dumps({"time": 1.8e9, "event": "bad_sample", "step": step, "sample_id": step}) + "\n")
    text = write_report(run).read_text()
    assert POINTS < 2000 and len(text) < 1_500_000
    assert "503 checkpoint events" in text and "500 bad sample events" in text


def test_runs_beside_each_other(tmp_path: Path) -> None:
    """Their curves in one figure, what each reached, and only the settings that differ.

    Also with a run that has nothing yet, or one that diverged before its first log line.
    """
    run, other, young = make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=300), tmp_path / "c"
    changed = RECIPE.replace("name: sample", "name: half").replace("sample_rate: 1.0", "sample_rate: 0.25")
    (other / "recipe.yaml").write_text(changed + "schedule: {warmup: 2 epochs}\n")
    young.mkdir()
    (young / "recipe.yaml").write_text(RECIPE.replace("name: sample", "name: young"))
    (lost := tmp_path / "d").mkdir()
    (lost / "recipe.yaml").write_text(RECIPE.replace("name: sample", "name: lost"))
    ended: list[dict] = [
        {"event": "start", "step": 0},
        {"event": "nonfinite", "step": 2},
        {"event": "error", "reason": "the loss was not finite"},
    ]
    (lost / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in ended))
    text = write_report(run, others=[other, young, lost]).read_text()
    page = Links()
    page.feed(text)
    assert page.fetched == [] and page.open == []
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", text)]
    at = cells.index("phases.refinement.sample_rate")
    assert cells[at : at + 5] == ["phases.refinement.sample_rate", "1.0", "0.25", "1.0", "1.0"]
    assert cells[at + 5 : at + 10] == ["schedule.warmup", "", "2 epochs", "", ""]
    assert "method.name" not in cells and "phases.alignment.sample_rate" not in cells
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    at = cells.index("half")
    assert cells[at + 1 : at + 4] == ["done", "300", f"{rows[-1]['loss']:.3f}"]  # 30 lines: a twentieth is one
    at = cells.index("lost")
    assert cells[at + 1 : at + 6] == ["error: the loss was not finite", "2", "", "", ""]
    # one definition of speed, in the table and in the tile
    speed = f"{np.median([row['images_per_second'] for row in rows]):,.0f}"
    assert cells[cells.index("half") + 5] == speed and f"<b>{speed}</b>" in write_report(other).read_text()
    assert text.count("<svg") == 6 + 4 and text.count(">half</text>") == 6 and ">young</text>" not in text
    with pytest.raises(UserError, match="4 runs beside"):
        write_report(run, others=[other] * 4)
    assert "Their recipes are the same" in write_report(run, others=[run]).read_text()


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(RECIPE.replace("name: sample", "name: '<script>alert(1)</script>'"))
    assert "<script>" not in write_report(run).read_text()


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="absent"):
        write_report(tmp_path / "absent")


def on_track(run: Path) -> None:
    """What a run with a reference, on GPUs, leaves besides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"reference_low": 0.8 * row["loss"], "reference_high": 1.2 * row["loss"], "memory_gb": 12.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: list[dict] = [
        {"event": "reference", "card": "quickstart"},
        {
            "event": "first_loss",
            "loss": 9.2,
            "expected": 34.8,
            "bound": 2.9,
            "agrees": False,
            "causes": {"no_margin": 9.2},
        },
        {
            "event": "on_track",
            "epoch": 2.0,
            "loss": 12.2,
            "low": 11.0,
            "high": 14.0,
            "stand": "within",
            "card": "quickstart",
        },
    ]
    with open(run / "events.jsonl", "a") as file:
        file.writelines(json.dumps({"time": 1.8e9, **each}) + "\n" for each in found)
    environment = json.loads((run / "environment.json").read_text())
    command = ["lvtrain/main.py", "--recipe", "lvtrain/recipes/quickstart.yaml", "name=it's"]
    environment |= {"gpus": ["NVIDIA H200"] * 2, "identities": 500, "images": 12_000, "command": command}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "ds_config.json").write_text('{"zero_optimization": {"stage": 1}}')
    (run / "recipe.yaml").write_text(RECIPE + "schedule: {total: 600 steps}\n")


def test_where_the_run_stands_and_what_comes_next(tmp_path: Path) -> None:
    """The band, the first loss and its causes, sizes and the plan, the card and commands to paste."""
    run = make_run(tmp_path / "it's")
    on_track(run)
    files = read_run(run)
    assert [row["good"] for row in facts.standing(files)] == [False, True]
    assert {row["label"]: row["value"] for row in facts.sizes(files)}["identities"] == "500"
    rows, _ = facts.against_plan(files)
    recipe = recipes.resolve(files.recipe)
    plans = plan_phases(recipe, ranks=2, zero={"stage": 1}, num_classes=500, device=device("h200", per_node=2))
    assert [row["phase"] for row in rows] == list(plans)
    for row, plan in zip(rows, plans.values()):
        assert row["speed_planned"] == f"{2 * plan.images_per_second:,.0f}" and row["memory"] == "12.5"
        assert row["memory_planned"] == f"{plan.total_memory / 1e9:.1f}" and row["mfu_planned"] == f"{plan.mfu:.0%}"
    assert (found := facts.card(files)) is not None and found["name"] == "quickstart"
    for step in facts.next_steps(files):
        words = shlex.split(step["command"])
        assert words[0] == "python" and (Path(__file__).parents[1] / words[1]).is_file() and str(run) in words
    text = write_report(run).read_text()
    page = Links()
    page.feed(text)
    assert page.open == [] and "<script" not in text and 'href="#card"' in text
    assert text.count('<g class="hover">') == text.count("<svg")
    loss = next(json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert f"step 10\nsample: {loss:.4g}\nband from: {0.8 * loss:.4g}" in text


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    on_track(run)
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": 1.9e9, "event": "stop", "step": 600}) + "\n")
    go_on = facts.next_steps(read_run(run))[0]["command"]
    assert shlex.split(go_on)[-3:] == ["--recipe", "lvtrain/recipes/quickstart.yaml", "name=it's"]


def test_a_run_keeps_its_colour(tmp_path: Path) -> None:
    """Also in figures for which an earlier run has no values."""
    run, other, third = (make_run(tmp_path / name) for name in "abc")
    (other / "recipe.yaml").write_text(RECIPE.replace("name: sample", "name: other"))
    (third / "recipe.yaml").write_text(RECIPE.replace("name: sample", "name: third"))
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["grad_norm"]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(run, others=[other, third]).read_text()
    figures = [figure for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if ">third</text>" in figure]
    without = [figure for figure in figures if ">other</text>" not in figure]
    assert len(figures) == 6 and len(without) == 1
    for figure in figures:
        lines = set(re.findall(r"fill: none; stroke: var\((--[a-z]+)\)", figure)) - {"--grid", "--muted"}
        assert lines == {"--blue", "--red"} | ({"--teal"} if figure not in without else set())
