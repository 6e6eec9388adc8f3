"""The one reader of weights, for `init_from`, teachers, evaluation and export alike.

`open_source(path)` takes a run, a checkpoint, an exported folder, other projects' files (`reading`), or an ONNX file of a
known network. Tensors have the names of the evaluated network, which takes RGB.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lvtrain.checkpoint.reader import Weights, open_shapes, open_weights
from lvtrain.errors import UserError
from lvtrain.files.reading import parse_json
from lvtrain.weights.architecture import Architecture, recognise
from lvtrain.weights.foreign import scale_pixels, swap_colours
from lvtrain.weights.model_input import ASSUMED, OURS, ModelInput
from lvtrain.weights.onnx.file import recogniser
from lvtrain.weights.reading import Weights as ForeignWeights
from lvtrain.weights.reading import read_weights

CONFIG, WEIGHTS, ROWS = "config.json", "model.safetensors", "class_rows.safetensors"  # of an exported folder
_T = TypeVar("_T")
TEACHER = "teacher.backbone."

State = dict[str, torch.Tensor]


class Source(ABC):
    """Weights at a path. Opening reads names and shapes. Tensors are read on demand, if the format allows it.

    Attributes:
        kind: which weights these are, for messages.
        shapes: of the evaluated network's tensors, by name.
        centres_shape: [C, d] of the class centres, if the source holds all of them.
        input_line: colour order and range of the images that another project's file takes, and who said so; empty for lvtrain's own.
        takes: how the network of `state` takes its images: as lvtrain's do, unless `open_source` was asked to leave the range as it is.
    """

    kind: str
    shapes: dict[str, torch.Size]
    centres_shape: torch.Size | None = None
    takes: ModelInput = OURS
    input_line: str = ""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def state(self) -> State:
        """The evaluated network's tensors by name, on the host."""

    def architecture(self) -> Architecture:
        """The backbone that these weights fit.

        Raises:
            UserError: the source does not record it, and names and shapes fit no backbone.
        """
        return recognise({name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()})

    def class_centres(self, start: int, stop: int) -> torch.Tensor:
        """Class centres `[stop - start, d]`, float32 on the host; only if there is a `centres_shape`."""
        raise NotImplementedError(f"{type(self).__name__} has no class centres")


class RunSource(Source):
    """A run (its newest valid checkpoint) or a checkpoint of ours."""

    def __init__(self, path: Path, average: bool) -> None:
        super().__init__(path)
        self._average = average
        everything = open_shapes(path)
        self.shapes = strip(everything, "ema.") if average else evaluated(everything)
        if not self.shapes:
            raise UserError(f"{path} has no moving average; its recipe has no ema section")
        self.centres_shape = everything.get("classifier.weight")

    @cached_property
    def _opened(self) -> Weights:
        return open_weights(self.path)

    @property
    def kind(self) -> str:  # type: ignore[override]
        found = self._opened
        place = f"step {found.step}, phase {found.phase}" if found.recipe else f"checkpoint of step {found.step}"
        return place + (", moving average" if self._average else "")

    def architecture(self) -> Architecture:
        recipe = self._opened.recipe
        return architecture_from(recipe["backbone"]) if recipe else super().architecture()

    def state(self) -> State:
        found = self._opened
        if self._average:
            return found.average or {}
        trained = {f"backbone.param.{name}": value for name, value in found.backbone.items()}
        teacher = {n: found.reader.replicated(n) for n in sorted(found.reader.names) if n.startswith(TEACHER)}
        return evaluated(trained | teacher)

    def class_centres(self, start: int, stop: int) -> torch.Tensor:
        return self._opened.reader.rows("classifier.weight", start, stop)


class ExportedSource(Source):
    """A folder that lvtrain exported."""

    kind = "exported folder"

    def __init__(self, path: Path, backbone: dict[str, Any]) -> None:
        super().__init__(path)
        self._architecture = architecture_from(backbone)
        try:
            with safe_open(path / WEIGHTS, "pt") as stored:
                self.shapes = {name: torch.Size(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path / WEIGHTS} is not a whole safetensors file ({error}); export it again") from error
        if (path / ROWS).is_file():
            with self._rows() as stored:
                self.centres_shape = torch.Size(stored.get_slice("weight").get_shape())

    def architecture(self) -> Architecture:
        return self._architecture

    def state(self) -> State:
        return load_file(self.path / WEIGHTS)

    def class_centres(self, start: int, stop: int) -> torch.Tensor:
        with self._rows() as stored:
            return stored.get_slice("weight")[start:stop]  # type: ignore[no-any-return]

    def _rows(self) -> Any:
        try:
            return safe_open(self.path / ROWS, "pt")
        except SafetensorError as error:
            raise UserError(f"{self.path / ROWS} is not a whole safetensors file ({error}); import it again") from error


class ForeignSource(Source):
    """Other projects' weights. They are read whole, because only all of them together give the names."""

    def __init__(self, path: Path, average: bool, takes: str, keep_range: bool) -> None:
        super().__init__(path)
        weights = read_weights(path, average=average, takes=takes)
        if not weights.backbone:
            raise UserError(f"{path} holds {weights.kind}, no backbone")
        self.kind, self._weights, self.input_line = weights.kind, weights.backbone, weights.input
        if path.suffix != ".onnx":
            self._turn(weights, takes, keep_range)
        self.shapes = {name: tensor.shape for name, tensor in self._weights.items()}
        self._rows = weights.rows
        self.centres_shape = None if weights.rows is None else weights.rows.shape

    def _turn(self, weights: ForeignWeights, takes: str, keep_range: bool) -> None:
        """To RGB, and to our range where that is exact."""
        said = {"colours": "its file says so" if weights.bgr else ASSUMED, "range": ASSUMED}
        found = replace(OURS, colours="bgr" if weights.bgr else "rgb", sources=said).changed(takes)
        self.input_line = found.pixels()
        if not keep_range:
            if found.mean != OURS.mean:
                raise UserError(
                    f"{self.path}, input {takes!r}: only a mean of 127.5 can be taken over by the first layer's weights; "
                    "evaluate takes any"
                )
            if found.std != OURS.std:
                self._weights = scale_pixels(self._weights, [127.5 / value for value in found.std])
                found = replace(found, std=OURS.std)
        if found.colours == "bgr":
            self.kind, self._weights = f"{self.kind}, turned from BGR to RGB", swap_colours(self._weights)
            turned = f"the weights were turned from BGR, {found.sources['colours']}"
            found = replace(
                found,
                colours="rgb",
                mean=found.mean[::-1],
                std=found.std[::-1],
                sources={**found.sources, "colours": turned},
            )
        self.takes = found

    def state(self) -> State:
        return self._weights

    def class_centres(self, start: int, stop: int) -> torch.Tensor:
        assert self._rows is not None
        return self._rows[start:stop]


def open_source(path: str | Path, *, average: bool = False, takes: str = "", keep_range: bool = False) -> Source:
    """Whatever weights lie at `path`, for RGB images in our range.

    Args:
        path: a run, a checkpoint, an exported folder, another project's file or an insightface pack.
        average: take a run's moving average instead of the weights.
        takes: how another project's network takes its images, where the file does not say so; see `ModelInput.changed`.
        keep_range: the caller feeds images as `Source.takes` says; else the first layer's weights take over the range, where that is exact.

    Raises:
        UserError: nothing usable there, a damaged file, no moving average, or a range that the first layer cannot take over.
    """
    path = recogniser(Path(path))
    if (backbone := _exported_backbone(path)) is not None:
        if average:
            raise UserError(f"{path} has no moving average; runs have one where the recipe has an ema section")
        _refuse_words(path, takes)
        return ExportedSource(path, backbone)
    if (path.is_dir() and not any(path.glob("*.safetensors"))) or (path / "manifest.json").is_file():
        _refuse_words(path, takes)
        return RunSource(path, average)
    return ForeignSource(path, average, takes, keep_range)


def _refuse_words(path: Path, takes: str) -> None:
    if takes:
        raise UserError(f"{path}, input {takes!r}: lvtrain's own weights take RGB, -1..1; leave it out")


def architecture_from(section: dict[str, Any]) -> Architecture:
    """From a recipe's `backbone` section, resolved."""
    return Architecture(
        section["name"], section["embedding_dim"], section["image_size"], dict(section.get("overrides", {}))
    )


def evaluated(everything: dict[str, _T]) -> dict[str, _T]:
    """The tensors of a checkpoint that are evaluated, by the evaluated network's names.

    That is a self-supervised run's teacher, else the trained module. This may hold the network as `backbone`, beside a
    head or a temperature that are only trained.
    """
    if teacher := strip(everything, TEACHER):
        return teacher
    trained = strip(everything, "backbone.param.") | strip(everything, "backbone.buffer.")
    return strip(trained, "backbone.") or trained


def strip(values: dict[str, _T], prefix: str) -> dict[str, _T]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _exported_backbone(path: Path) -> dict[str, Any] | None:
    """The backbone section of a folder that lvtrain exported; None for anything else."""
    if not (path.is_dir() and (path / CONFIG).is_file() and (path / WEIGHTS).is_file()):
        return None
    try:
        config = parse_json((path / CONFIG).read_text())
        return dict(config["lvtrain"]["backbone"]) if "lvtrain" in config else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is a damaged folder ({type(error).__name__}: {error}); export it again") from error
