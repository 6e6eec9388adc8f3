"""Evaluates a model on benchmarks: prints a table, writes a JSON file and plots.

On several GPUs, start it with torchrun or accelerate launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lvtrain.errors import UserError, one_line_errors
from lvtrain.files.atomic import write_json


def main(
    model: Annotated[
        str, typer.Argument(help="run, checkpoint, safetensors folder, .pt file, .onnx file, or raw_pixels")
    ],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            "-b",
            "--benchmark",
            metavar="NAME:PATH",
            help="a benchmark; its path decides the protocol. NAME:PROTOCOL:PATH chooses it: verification (.bin file), "
            "ijb, ijb_identification (folder with meta/), tinyface (its published folder), all_pairs, identification, clustering, "
            "calibration (labelled set; the last also a .bin file), megaface (PROBES,DISTRACTORS). Repeat it for more benchmarks",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROTOCOL.OPTION=VALUE",
            help="such as ijb.detector_scores=false, all_pairs.flip=false, clustering.cosine=0.35",
        ),
    ] = None,
    groups: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME:]FILE",
            help="table identity,group (labelled sets), template,group (ijb) or image,group (.bin): error rates by group, "
            "for every 1:1 benchmark or that of NAME",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="folder for evaluation.json and plots; default: RUN/evaluated for a run, RUN/evaluated_CHECKPOINT for a checkpoint, "
            "otherwise evaluation/",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="images per forward call")] = 128,
    average: Annotated[bool, typer.Option(help="use the moving average of a run's weights (ema)")] = False,
    input_: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="WORDS",
            help='how the model takes its images, if its file does not say so: "bgr 0..255", "imagenet", "mean=127.5 std=128", '
            '"nhwc"; the line that begins with input shows what is used',
        ),
    ] = "",
    cpu: Annotated[bool, typer.Option(help="do not use a GPU")] = False,
    debug: Annotated[bool, typer.Option(help="show tracebacks")] = False,
) -> None:
    """Evaluates MODEL on every benchmark that is given."""
    with one_line_errors("evaluate", out or model, debug=debug):
        folder = out or _folder(Path(model))
        # imported here, because they import torch: --help answers at once
        from accelerate import PartialState
        from rich.console import Console

        from lvtrain.distributed.world import World
        from lvtrain.evaluation import suite
        from lvtrain.evaluation.spread import Spread

        options = _options(option or [])
        tasks = suite.with_groups([suite.parse(text, options) for text in benchmark or []], groups or [])
        if not tasks:
            raise UserError("no benchmark; give at least one --benchmark NAME:PATH")
        state = PartialState(cpu=cpu)
        console = Console(quiet=not state.is_main_process)
        opened = _model(model, state.device, average, input_)
        if opened.taken:
            console.print(opened.taken, soft_wrap=True, markup=False)
        world = World(state.process_index, state.num_processes, state.local_process_index, state.device)
        spread = Spread(opened.forward)
        refused: dict[str, str] = {}  # a benchmark that fails does not stop the others
        with _bar(console) as bar:
            embedded = bar.add_task("images embedded", total=None)

            def say(text: str) -> None:
                console.print(text, style="dim", soft_wrap=True, markup=False)
                bar.reset(embedded, total=None)

            setting = suite.Setting(
                world, state.device, batch, opened.image_size,
                progress=lambda done, total: bar.update(embedded, completed=done, total=total),
            )  # fmt: skip
            results = suite.evaluate(spread, tasks, setting, say=say, refused=refused)
        if results and state.is_main_process:
            alignments = _alignments(tasks, results)
            _show(opened.name, results, console)
            for line in alignments:
                console.print(line, soft_wrap=True, style="bold" if line.startswith("warning") else "dim")
            warning = "" if model == "raw_pixels" else spread.warning(opened.others)
            if warning:
                console.print(f"warning: {warning}", style="bold red", soft_wrap=True, markup=False)
            about: dict[str, Any] = {"model": opened.name, "space": _space(model, average), "input": opened.taken}
            about |= {"mean_cosine": spread.mean_cosine, "warning": warning}
            _write(about, results, tasks, folder, opened.image_size)
            console.print(f"figures and plots: {folder}/", soft_wrap=True)
            _calibration(Path(model), opened.weights, results, console)
        state.wait_for_everyone()
        state.destroy_process_group()
        if refused:
            raise UserError("; ".join(f"{task}: {reason}" for task, reason in refused.items()))


def _options(words: list[str]) -> dict[str, dict[str, Any]]:
    """`PROTOCOL.OPTION=VALUE` words as a dict of dicts."""
    from lvtrain.evaluation.protocol import PROTOCOLS
    from lvtrain.recipe import files as recipes

    values: dict[str, dict[str, Any]] = {}
    for word in words:
        PROTOCOLS.get(word.partition(".")[0])
        recipes.apply(values, word)
    return values


def _folder(model: Path) -> Path:
    """The default folder. For a run it lies in the run, where its report finds it; `evaluation/` is the trainer's."""
    from lvtrain.export.model_card import run_of

    run = run_of(model)
    if run is None:
        return Path("evaluation")
    return model / "evaluated" if run == model.absolute() else run / f"evaluated_{model.absolute().name}"


@dataclass
class _Opened:
    """A model to evaluate. `taken` is the line of its input, `others` its forward on images in other ranges."""

    name: str
    forward: Callable[[Any], Any]
    image_size: int = 112
    weights: str = ""
    taken: str = ""
    others: dict[str, Callable[[Any], Any]] = field(default_factory=dict)


def _model(path: str, device: Any, average: bool, words: str) -> _Opened:
    from lvtrain.evaluation import raw_pixels

    if path == "raw_pixels":
        return _Opened("raw pixels", raw_pixels)
    from lvtrain.weights import load_model

    model = load_model(path, device=device, average=average, takes=words)
    others: dict[str, Callable[[Any], Any]] = {
        other.range: partial(model.forward, takes=other) for other in model.takes.others()
    }
    return _Opened(model.name, model.forward, model.image_size, model.weights, model.takes.line(), others)


def _bar(console):
    """How many images are embedded, on a terminal; elsewhere the line of each benchmark is all."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show(name, results, console) -> None:
    from rich.table import Table

    from lvtrain.evaluation import suite
    from lvtrain.evaluation.protocol import PROTOCOLS

    table = Table("benchmark", "protocol", "figure", "value", title=name, title_justify="left")
    for benchmark, result in results.items():
        for row, (figure, value) in enumerate(suite.headline(result)):
            first = (benchmark, PROTOCOLS.get(result["kind"]).title) if row == 0 else ("", "")
            table.add_row(*first, figure, value)
        table.add_section()
    console.print(table)


def _alignments(tasks, results) -> list[str]:
    """A line on how the faces of each `.bin` file are aligned; the figures behind it go into the results."""
    from lvtrain.evaluation.alignment import UNKNOWN, look
    from lvtrain.evaluation.bins import read_bin, read_sidecar

    lines = []
    for task in tasks:
        for path in task.paths if task.name in results else ():
            if path.suffix == ".bin":
                stated = str(read_sidecar(path).get("alignment", UNKNOWN))
                found = look(read_bin(path, strict=False)[0], stated, name=str(path))
                results[task.name]["alignment"] = asdict(found) | {"agrees": found.agrees}
                lines.append(found.line(task.name))
    return lines


def _space(model: str, average: bool) -> str | None:
    from lvtrain.weights.space import space_of

    return None if model == "raw_pixels" else space_of(model, average=average)


def _write(about, results, tasks, out: Path, image_size: int) -> None:
    from lvtrain.evaluation import plots
    from lvtrain.evaluation.protocol import PROTOCOLS

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", {**about, "benchmarks": results}, indent=1)
    drawn = plots.roc_of(results)
    for task in tasks:
        if (result := results.get(task.name)) is not None:
            drawn |= PROTOCOLS.get(task.kind).figures(task.name, result, task.paths, image_size)
    for file, figure in drawn.items():
        figure.savefig(out / f"{file}.png", dpi=150)


def _calibration(model: Path, weights: str, results, console) -> None:
    """Writes the calibrated thresholds where the model card reads them."""
    from lvtrain.export.model_card import keep_calibration

    found = {name: result for name, result in results.items() if result["kind"] == "calibration"}
    if found and (kept := keep_calibration(model, weights, found)) is not None:
        console.print(f"thresholds for the model card: {kept}")


if __name__ == "__main__":
    typer.run(main)
