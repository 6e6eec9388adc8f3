"""Reference curves: which card a run follows, the band around it, and what a run is said to do beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvtrain.health.curves import FOLDER, Curve, PhaseEnds, Reference, find_reference, load_curve
from lvtrain.health.make_curve import make_curve
from lvtrain.health.on_track import OnTrack
from lvtrain.recipe import files as recipes

CURVES = sorted(path.stem for path in FOLDER.glob("*.json"))
DATA = {"num_classes": 500, "num_samples": 12_000}


def found(name: str, *overrides: str, **sizes: int) -> Reference | None:
    recipe = recipes.load(FOLDER.parent / f"{name}.yaml", overrides)
    stated = json.loads((FOLDER / f"{name}.json").read_text()).get("data", {})
    known: dict[str, int] = {key: getattr(recipe.data, key) or stated[key] for key in ("num_classes", "num_samples")}
    return find_reference(recipe, **(known | sizes))


@pytest.mark.parametrize("name", CURVES)
def test_a_card_finds_its_own_curve(name: str) -> None:
    """Also under another name. The only exception is the log of another sample rate."""
    reference = found(name, "name=mine", "seed=3", "checkpoint.every=100 steps")
    if name == "cosface_r50_glint360k":
        assert reference is None
        return
    assert reference is not None and reference.curve.name == name
    log = json.loads((FOLDER / f"{name}.json").read_text())["differs"]
    assert reference.differs.keys() == log.keys()


def test_what_a_run_changes_is_listed_or_ends_the_comparison() -> None:
    name = "cosface_r50_webface4m"
    reference = found(name, "optimizer.lr=0.05", "phases.0.micro_batches=16")
    assert reference and reference.differs == {"optimizer.lr": (0.05, 0.1)}
    assert found(name, num_classes=205_000) is not None  # a cleaned copy of the set
    assert found(name, num_classes=100_000) is None
    assert found(name, "classifier.margin.m=0.3") is None
    assert found(name, "phases.0.sample_rate=0.5") is None
    assert found(name, "backbone.name=iresnet18") is None
    reference = found("cosface_mbf_glint360k", "phases.0.global_batch=4096")
    assert reference and "phases.0.global_batch" not in reference.differs  # as the log was trained


def test_each_published_log_is_within_its_own_band() -> None:
    for name in CURVES:
        curve = load_curve(FOLDER / f"{name}.json")
        if curve.runs > 1 or not len(curve.epochs):
            continue
        means = json.loads((FOLDER / f"{name}.json").read_text())["loss_by_epoch"]
        for epoch, mean in enumerate(means):
            low, high = curve.mean_band(epoch, epoch + 1)
            assert low < mean < high, (name, epoch)


def test_another_network_is_outside() -> None:
    """ViT-S ends 30% above ViT-B, IResNet-50 at twice the loss of IResNet-100: the band tells them apart."""
    for worse, better in (
        ("cosface_vits_webface42m", "cosface_vitb_webface42m"),
        ("cosface_r50_webface4m", "cosface_r100_webface4m"),
    ):
        band = load_curve(FOLDER / f"{better}.json")
        means = json.loads((FOLDER / f"{worse}.json").read_text())["loss_by_epoch"]
        above = [mean > band.mean_band(epoch, epoch + 1)[1] for epoch, mean in enumerate(means)]
        assert above[-1] and sum(above) > len(above) / 2


def test_our_own_curves_hold_for_a_seed_that_they_do_not_have(tmp_path: Path) -> None:
    for name in CURVES:
        values = json.loads((FOLDER / f"{name}.json").read_text())
        seeds = values.get("loss_by_seed", [])
        assert len(seeds) != 1  # one run says nothing about another
        for number, left_out in enumerate(seeds):
            rest = values | {"loss_by_seed": seeds[:number] + seeds[number + 1 :]}
            (tmp_path / f"{name}.json").write_text(json.dumps(rest))
            curve, epochs = load_curve(tmp_path / f"{name}.json"), np.array(values["epochs"])
            for epoch in range(int(curve.last)):
                inside = (epochs > epoch) & (epochs <= epoch + 1)
                low, high = curve.mean_band(epoch, epoch + 1)
                assert low < np.mean(np.array(left_out)[inside]) < high


# ------------------------------------------------------------------------------------------------------------------ a run


def follow(
    tmp_path: Path, losses: Any, ends: dict[str, PhaseEnds] | None = None
) -> tuple[OnTrack, list[dict[str, Any]]]:
    """A run of 100 steps an epoch against a curve that falls from 20 by 2 an epoch; the events of its rows."""
    epochs = np.linspace(0, 8, 81)
    curve = Curve("card", "test", 1, epochs, 20 - 2 * epochs, 20 - 2 * epochs, ends or {})
    run = OnTrack("not known", Reference(curve, {}), tmp_path)
    events = []
    for step in range(10, 10 * len(losses) + 1, 10):
        row = {"step": step, "epoch": step / 100, "loss": losses[step // 10 - 1]}
        events += [note.fields | {"event": note.event} for note in run.add(row)]
    return run, events


def test_a_run_is_compared_at_the_ends_of_epochs_and_early(tmp_path: Path) -> None:
    steps = np.arange(10, 401, 10) / 100
    for shift, stand in ((0.0, "within"), (8.0, "above"), (-8.0, "below")):
        _, events = follow(tmp_path, list(20 - 2 * steps + shift))
        assert [event["epoch"] for event in events] == [0.25, 0.5, 1.0, 2.0, 3.0, 4.0]
        assert {event["stand"] for event in events} == {stand}
        assert [event["loss"] for event in events[2:]] == pytest.approx(
            [18.9 + shift, 16.9 + shift, 14.9 + shift, 12.9 + shift]
        )


def test_the_band_is_that_of_a_run_somewhat_earlier_or_later(tmp_path: Path) -> None:
    run, _ = follow(tmp_path, [20.0])
    # at epoch 4 half an epoch earlier or later: 11 to 13, and 5% of the loss
    assert run.columns(4.0) == {"reference_low": pytest.approx(11 * 0.95), "reference_high": pytest.approx(13 * 1.05)}
    # at epoch 1 a quarter
    assert run.columns(1.0) == {
        "reference_low": pytest.approx(17.5 * 0.95),
        "reference_high": pytest.approx(18.5 * 1.05),
    }
    assert run.columns(8.5) == {}


def test_a_resumed_run_reads_its_rows_and_a_roll_back_forgets_them(tmp_path: Path) -> None:
    rows = [{"step": step, "epoch": step / 100, "loss": 19.0} for step in range(10, 91, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    run, _ = follow(tmp_path, [])
    notes = run.add({"step": 100, "epoch": 1.0, "loss": 9.0})
    assert [note.fields["loss"] for note in notes] == [18.0]
    run.add({"step": 110, "epoch": 1.1, "loss": 500.0})
    run.add({"step": 91, "epoch": 0.91, "loss": 19.0})
    assert [note.fields["loss"] for note in run.add({"step": 100, "epoch": 1.0, "loss": 19.0})] == [19.0]


def test_when_delta_is_reached(tmp_path: Path) -> None:
    ends = {"alignment": PhaseEnds(1.0, 2.0)}
    run, _ = follow(tmp_path, [], ends)
    (note,) = run.phase_started("alignment", 0.2)
    assert (note.event, note.fields["earliest"], note.fields["latest"]) == ("delta_expected", 1.0, 2.0)
    late = [
        note for step in (190, 200, 210, 220) for note in run.add({"step": step, "epoch": step / 100, "loss": 17.0})
    ]
    assert [note.event for note in late if note.event != "on_track"] == ["delta_late"]
    (note,) = run.phase_ended(2.2, "cos2")
    assert (note.fields["stand"], note.fields["reached"]) == ("later", True)
    assert run.phase_started("refinement", None) == [] and run.phase_ended(8.0, "schedule") == []


def test_a_curve_is_made_from_runs(tmp_path: Path) -> None:
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = [{"step": step, "epoch": step / 10, "loss": 20.0 - step - seed} for step in range(1, 6)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[: 5 - seed]))
        end = {"event": "phase_end", "phase": "alignment", "reason": "cos2", "samples_seen": 12_000 * (1 + seed)}
        (folder / "events.jsonl").write_text(json.dumps(end) + "\n")
        (folder / "environment.json").write_text(json.dumps({"identities": 500, "images": 12_000}))
    values = make_curve([tmp_path / "0", tmp_path / "1"], "test")
    assert values["epochs"] == [0.1, 0.2, 0.3, 0.4] and values["data"] == DATA
    assert values["loss_by_seed"] == [[19.0, 18.0, 17.0, 16.0], [18.0, 17.0, 16.0, 15.0]]
    assert values["phase_ends"] == {"alignment": [0.75, 2.5]}
