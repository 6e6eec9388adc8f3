"""How does a network take its images: range, mean and std, colour order, layout, size, images a call?

lvtrain's own networks take RGB, (x - 127.5) / 127.5, `[N, 3, S, S]`. Other files differ, and a file that is fed wrongly gives embeddings
that look like embeddings. So each property is taken from the first of these that says it, and `ModelInput.line` prints which one it was:

1. the user: `--input "bgr 0..255"`, see `changed`;
2. the file's metadata, which lvtrain's exports carry;
3. the graph: shape and type of its input, and the arithmetic before its first layer;
4. the first BatchNorm: its mean and variance show in which range the network was trained;
5. the field's convention, which is lvtrain's own. The line then says "assumed".

The evaluated images never choose: the same file would be fed differently on two sets, and figures would depend on it. They are only used to
warn (`lvtrain/evaluation/spread.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lvtrain.errors import UserError

METADATA = "lvtrain.input"  # the key in an ONNX file's metadata; its value is what `changed` reads
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
RANGES = {
    "-1..1": ((127.5,) * 3, (127.5,) * 3),
    "0..255": ((0.0,) * 3, (1.0,) * 3),
    "0..1": ((0.0,) * 3, (255.0,) * 3),
    "-127.5..127.5": ((127.5,) * 3, (1.0,) * 3),
    "imagenet": IMAGENET,
}
_WORDS = (
    "rgb, bgr, nchw, nhwc, LOW..HIGH, imagenet, mean=R,G,B with std=R,G,B (of pixels 0..255), pixels of a side, or "
    "batch=IMAGES a call"
)
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class ModelInput:
    """What a file's network takes; as it stands, what lvtrain's networks take.

    Attributes:
        size: pixels of a side.
        colours: rgb or bgr, the order of the channels.
        mean, std: the network gets (pixel - mean) / std, pixels from 0 to 255, by channel in its own order.
        layout: nchw or nhwc.
        dtype: float32, float16, float64 or uint8.
        batch: images a call, always exactly so many; None for any number.
        sources: who said it, for `colours`, `range`, `layout`, `size` and `batch`; `SHAPE` is the declared shape of the file's input.
    """

    size: int = 112
    colours: str = "rgb"
    mean: Channels = (127.5,) * 3
    std: Channels = (127.5,) * 3
    layout: str = "nchw"
    dtype: str = "float32"
    batch: int | None = None
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    def given(self, images: torch.Tensor) -> torch.Tensor:
        """Images as lvtrain feeds its networks, float32 RGB `[N, 3, S, S]`, (x - 127.5) / 127.5 -> as this network takes them."""
        if self.colours == "bgr":
            images = images.flip(1)
        if (self.mean, self.std) != (OURS.mean, OURS.std):
            mean, std = (
                torch.tensor(values, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
                for values in (self.mean, self.std)
            )
            images = ((images.float() + 1) * 127.5 - mean) / std
        if self.layout == "nhwc":
            images = images.permute(0, 2, 3, 1)
        if self.dtype == "uint8":
            return images.round().clamp(0, 255).to(torch.uint8)
        return images if self.dtype == "float32" else images.to(getattr(torch, self.dtype))

    def changed(self, words: str, source: str = "given") -> ModelInput:
        """With what `words` say, such as "bgr 0..255", "nhwc imagenet" or "mean=127.5 std=128".

        Raises:
            UserError: a word that is not known, or values that cannot be meant.
        """
        found: dict[str, Any] = {}
        for word in words.lower().replace("+", " ").split():
            if word in ("rgb", "bgr"):
                found["colours"] = word
            elif word in ("nchw", "nhwc"):
                found["layout"] = word
            elif word == "imagenet":
                found["mean"], found["std"] = IMAGENET
            elif word.isdecimal() and 16 <= int(word) <= 1024:
                found["size"] = int(word)
            elif match := re.fullmatch(r"batch=(\d+)", word):
                found["batch"] = int(match[1])
            elif match := re.fullmatch(r"(-?[\d.]+?)\.\.(-?[\d.]+)", word):
                low, high = map(_number, match.groups())
                if low >= high:
                    raise UserError(f"input {words!r}: {word} is empty; write LOW..HIGH, such as 0..255")
                std = 255 / (high - low)
                found["mean"], found["std"] = (-low * std,) * 3, (std,) * 3
            elif match := re.fullmatch(r"(mean|std)=([-\d.,]+)", word):
                values = tuple(map(_number, match[2].split(",")))
                if len(values) not in (1, 3):
                    raise UserError(f"input {words!r}: {word} has {len(values)} values; give one, or one a channel")
                found[match[1]] = values * (3 // len(values))
            else:
                raise UserError(f"input {words!r}: {word} is unknown; the words are {_WORDS}")
        _check(words, found, self)
        sources = dict(self.sources)
        for name, key in (("colours", "colours"), ("range", "mean"), ("layout", "layout"), ("size", "size")):
            if key in found and sources.get(name) != SHAPE:
                sources[name] = source
        return replace(self, **found, sources=sources)

    @property
    def range(self) -> str:
        """Words for mean and std that `changed` reads back to the same values."""
        for name, (mean, std) in RANGES.items():
            if (self.mean, self.std) == (mean, std):
                return name
        return f"mean={_plain(self.mean)} std={_plain(self.std)}"

    @property
    def words(self) -> str:
        """What `changed` needs to hear for the same input."""
        return f"{self.colours} {self.range} {self.layout} {self.size}"

    def pixels(self) -> str:
        """Colour order and range, with who said them."""
        return f"{self.colours.upper()}{self._said('colours')}, {self.range}{self._said('range')}"

    def _said(self, name: str) -> str:
        who = self.sources.get(name, SHAPE)
        return "" if who == SHAPE else f" ({who})"

    def line(self) -> str:
        """The input in one line, with who said it."""
        batch = "any number of images" if self.batch is None else f"{self.batch} image{'s' * (self.batch > 1)}"
        layout = f"{self.layout.upper()} {self.dtype}{self._said('layout')}"
        return f"input: {self.pixels()}, {layout}, {self.size}x{self.size}{self._said('size')}, {batch} a call"

    def others(self) -> list[ModelInput]:
        """The same input in the other usual ranges."""
        found = [replace(self, mean=mean, std=std) for mean, std in RANGES.values()]
        return [other for other in found if other != self]

    @property
    def assumed(self) -> bool:
        """Whether only the field's convention says in which range the network takes its pixels."""
        return self.sources.get("range", "") == ASSUMED


OURS = ModelInput()
ASSUMED, SHAPE = "assumed", "shape"


def _plain(values: Channels) -> str:
    return ",".join(f"{value:g}" for value in (values if len(set(values)) > 1 else values[:1]))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"input: {text!r} is not a number") from None


def _check(words: str, found: dict[str, Any], before: ModelInput) -> None:
    if ("mean" in found) != ("std" in found):
        raise UserError(f"input {words!r}: give mean and std together, in pixels from 0 to 255")
    if "std" in found:
        if min(found["std"]) <= 0:
            raise UserError(f"input {words!r}: std must be positive")
        if max(found["std"]) < 1 and 0 < max(found["mean"]) <= 1:
            raise UserError(
                f"input {words!r}: mean and std are of pixels from 0 to 255; multiply these by 255, or write imagenet"
            )
    if (layout := found.get("layout", before.layout)) != before.layout and before.sources.get("layout") == SHAPE:
        raise UserError(f"input {words!r}: the file's input has the shape of {before.layout}, not {layout}")
    if (size := found.get("size", before.size)) != before.size and before.sources.get("size") == SHAPE:
        raise UserError(f"input {words!r}: the file takes {before.size}x{before.size} images, not {size}")
    if (batch := found.get("batch", before.batch)) != before.batch and before.sources.get("batch") == SHAPE:
        raise UserError(f"input {words!r}: the file takes {before.batch} images a call, not {batch}")
    if batch == 0:
        raise UserError(f"input {words!r}: batch must be 1 or more")
