"""Evaluates a model on the field's benchmarks: a table, a JSON file and pictures. On several devices: start it with torchrun or accelerate launch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lvtrain.errors import EXIT_ERROR, UserError, told


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int


def main(
    model: Annotated[
        str, typer.Argument(help="run, checkpoint, safetensors folder, .pt file, .onnx file, or raw_pixels")
    ],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:PATH", help=".bin file; IJB folder (meta/, loose_crop/); labelled set (scored over all pairs)"
        ),
    ] = None,
    cluster: Annotated[list[str] | None, typer.Option(metavar="NAME:PATH", help="labelled set to cluster")] = None,
    megaface: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:PROBES,DISTRACTORS", help="folders of feature files or of people's images"),
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:PATH",
            help="cosine thresholds at FMR 1e-3 to 1e-6, from a .bin file or a labelled set; kept for the model card of a run or exported folder",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="folder for evaluation.json and the pictures; by default RUN/evaluated for a run, RUN/evaluated_CHECKPOINT for a checkpoint of one, "
            "else evaluation/ here",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images a forward call")] = 128,
    flip: Annotated[bool, typer.Option(help="add the embedding of the mirror image (a .bin set always does)")] = True,
    detector_scores: Annotated[bool, typer.Option(help="weight IJB faces by their detector score")] = True,
    cosine: Annotated[float, typer.Option(help="similarity that joins two faces in clustering")] = 0.4,
    average: Annotated[bool, typer.Option(help="take a run's moving average of the weights (ema)")] = False,
    cpu: Annotated[bool, typer.Option(help="do not use a GPU")] = False,
    debug: Annotated[bool, typer.Option(help="show tracebacks")] = False,
) -> None:
    """Evaluates MODEL on every benchmark named; what protocol a benchmark is follows from what lies at its path."""
    folder = out or _folder(Path(model))
    with _one_line_errors(debug, folder):
        from accelerate import PartialState
        from rich.console import Console

        from lvtrain.evaluation import suite

        kinds: list[tuple[list[str] | None, suite.Kind | None]] = [
            (benchmark, None),
            (cluster, "clustering"),
            (megaface, "megaface"),
            (calibrate, "calibration"),
        ]
        tasks = [suite.parse(text, kind) for texts, kind in kinds for text in texts or []]
        if not tasks:
            raise UserError(
                "nothing to do; name at least one --benchmark, --cluster, --megaface or --calibrate NAME:PATH"
            )
        state = PartialState(cpu=cpu)
        console = Console(quiet=not state.is_main_process)
        name, forward, image_size, weights = _model(model, state.device, average)
        setting = suite.Setting(
            world=Ranks(state.process_index, state.num_processes),
            device=state.device,
            batch=batch,
            image_size=image_size,
            flip=flip,
            detector_scores=detector_scores,
            cosine=cosine,
        )
        refused: dict[str, str] = {}  # what one benchmark lacks costs none of the others
        results = suite.evaluate(
            forward, tasks, setting, tell=lambda text: console.print(f"[dim]{text}"), refused=refused
        )
        if results and state.is_main_process:
            _show(name, results, console)
            _write(name, results, tasks, folder, image_size)
            console.print(f"figures and pictures: {folder}/", soft_wrap=True)
            _calibration(Path(model), weights, results, console)
        state.wait_for_everyone()
        state.destroy_process_group()
        if refused:
            raise UserError("; ".join(f"{task}: {reason}" for task, reason in refused.items()))


def _folder(model: Path) -> Path:
    """A run's own figures lie in the run, where its report finds them, beside `evaluation/`, which is the trainer's."""
    from lvtrain.export.model_card import run_of

    run = run_of(model)
    if run is None:
        return Path("evaluation")
    return model / "evaluated" if run == model.absolute() else run / f"evaluated_{model.absolute().name}"


def _model(path, device, average):
    """Name, forward on normalised images, image size, and which weights these are."""
    from lvtrain.evaluation import raw_pixels

    if path == "raw_pixels":
        return "raw pixels", raw_pixels, 112, ""
    from lvtrain.weights import load_model

    model = load_model(path, device=device, average=average)
    return model.name, model.forward, model.image_size, model.weights


def _show(name, results, console) -> None:
    from rich.table import Table

    from lvtrain.evaluation import suite

    table = Table("benchmark", "protocol", "figure", "value", title=name, title_justify="left")
    for benchmark, result in results.items():
        for row, (figure, value) in enumerate(suite.headline(result)):
            first = (benchmark, result["kind"].replace("_", " ")) if row == 0 else ("", "")
            table.add_row(*first, figure, value)
        table.add_section()
    console.print(table)


def _write(name, results, tasks, out: Path, image_size: int) -> None:
    from lvtrain.evaluation.plots import write_plots

    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps({"model": name, "benchmarks": results}, indent=1) + "\n")
    pairs = {task.name: task.paths[0] for task in tasks if task.kind == "verification"}
    write_plots(results, out, pairs=pairs, image_size=image_size)


def _calibration(model: Path, weights: str, results, console) -> None:
    """Thresholds go where the model card is written from."""
    from lvtrain.export.model_card import keep_calibration

    found = {name: result for name, result in results.items() if result["kind"] == "calibration"}
    if found and (kept := keep_calibration(model, weights, found)) is not None:
        console.print(f"thresholds for the model card: {kept}")


@contextmanager
def _one_line_errors(debug: bool, out: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"evaluate: error: {told(error, out)}", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from None


if __name__ == "__main__":
    typer.run(main)
