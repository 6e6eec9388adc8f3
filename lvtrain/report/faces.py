"""Figures with faces, of runs with a fViT or Part fViT: landmarks over training, and the class token's attention.

They are drawn from the run's checkpoints on a few images of its dataset, so the page then holds faces. For generated datasets
this is the default. For others it must be requested, because a report is passed on more easily than a dataset.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from lvtrain.backbones.fvit import FViT
from lvtrain.backbones.part_fvit import PartFViT
from lvtrain.checkpoint.files import step_of
from lvtrain.checkpoint.plan import committed
from lvtrain.data.images import try_decode
from lvtrain.data.shards import ReadError, ShardDataset
from lvtrain.errors import UserError
from lvtrain.methods.base import initial_backbone
from lvtrain.recipe import files as recipes
from lvtrain.recipe.sections import Recipe
from lvtrain.report.attention import class_attention
from lvtrain.report.files import RunFiles
from lvtrain.weights.source import open_source

FACES, MOMENTS, CELL = 6, 4, 160  # images, checkpoints at most, pixels a face
GENERATED = "generated faces"  # the provenance `lvtrain.datasets.synthetic` writes


@dataclass(frozen=True)
class Moment:
    """A backbone as it was at a step of the run."""

    step: int
    backbone: FViT


def face_pictures(run: RunFiles, *, any_dataset: bool = False) -> tuple[list[dict[str, str]], str]:
    """Figures (`title`, `note`, `png`: a data URI) of a run, and a line that says why there are none (empty if there is nothing to say).

    Args:
        run: the run to draw.
        any_dataset: draw images of datasets that are not generated, too.
    """
    kept = sorted(committed(run.folder / "checkpoints"), key=lambda path: step_of(path) or 0)
    if not kept or "fvit" not in str((run.recipe.get("backbone") or {}).get("name")):
        return [], ""
    try:
        recipe = recipes.resolve(run.recipe)
        dataset = ShardDataset(recipe.data.path)
        if not any_dataset and dataset.manifest.provenance.get("kind") != GENERATED:
            return [], "Pictures with faces of the dataset are drawn on request: tools/report.py RUN --faces."
        images = _images(dataset)
        moments = [_moment(recipe, path) for path in _spread(kept, MOMENTS)]
        return _figures(images, moments, recipe.backbone.image_size), ""
    except (UserError, ReadError, OSError) as error:  # a report must be possible without the run's data
        return [], f"No faces are drawn: {error}"


def _figures(images: list[np.ndarray], moments: list[Moment], size: int) -> list[dict[str, str]]:
    pixels = torch.stack([_normalised(image, size) for image in images])
    found = [class_attention(moment.backbone, pixels) for moment in moments]
    rows = [f"step {moment.step:,}" for moment in moments]
    drawn = []
    if isinstance(moments[0].backbone, PartFViT):
        cells = [[_with_points(image, points, size) for image, points in zip(images, p)] for _, p in found]
        note = "centres of the patches the landmark CNN places; colour: which of them, so that one colour should stay on one part of the face"
        drawn.append({"title": "Landmarks", "note": note, "png": _sheet(rows, cells)})
    cells = [
        [
            _with_attention(image, w, p, moments[0].backbone.patch, size)
            for image, w, p in zip(images, weights.mean(1), points)
        ]
        for weights, points in found
    ]
    note = "attention of the class token in the last block, mean over heads; bright: most of the image's own"
    drawn.append({"title": "Attention", "note": note, "png": _sheet(rows, cells)})
    return drawn


# ------------------------------------------------------------------------------------------------------------------ reading


def _spread(items: list[Path], most: int) -> list[Path]:
    """At most `most` of them, evenly spread, with the first and the last."""
    places = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))
    return [items[place] for place in places]


def _moment(recipe: Recipe, path: Path) -> Moment:
    backbone = initial_backbone(recipe, torch.device("cpu"))
    backbone.load_state_dict(open_source(path).state(), strict=False)
    assert isinstance(backbone, FViT)
    return Moment(step_of(path) or 0, backbone.eval())


def _images(dataset: ShardDataset) -> list[np.ndarray]:
    """One image each of identities spread over the dataset, uint8 [h, w, 3]."""
    labels = np.asarray(dataset.labels(np.arange(min(len(dataset), 100_000))))
    present, first = np.unique(labels, return_index=True)
    chosen = first[np.linspace(0, len(present) - 1, min(FACES, len(present))).astype(int)]
    decoded = [try_decode(dataset.read(int(sample))[0], upright=False) for sample in chosen]
    return [picture for picture in decoded if picture is not None]


def _normalised(image: np.ndarray, size: int) -> torch.Tensor:
    small = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
    return torch.from_numpy((small - 127.5) / 127.5).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------------------------ drawing


def _enlarged(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize((CELL, CELL), Image.Resampling.BICUBIC)


def _with_points(image: np.ndarray, points: torch.Tensor, size: int) -> Image.Image:
    picture = _enlarged(image)
    pen = ImageDraw.Draw(picture)
    colours = (matplotlib.colormaps["hsv"](np.linspace(0, 0.9, len(points)))[:, :3] * 255).astype(int)
    for (x, y), colour in zip(((points.numpy() + 0.5) * CELL / size).tolist(), colours.tolist()):
        pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=tuple(colour))
    return picture


def _with_attention(
    image: np.ndarray, weights: torch.Tensor, points: torch.Tensor, patch: int, size: int
) -> Image.Image:
    """The image, darker where attention is low. Each patch adds its weight at its place, blurred to half a patch."""
    scale = CELL / size
    y, x = np.mgrid[0:CELL, 0:CELL].astype(np.float32)
    heat, cover = np.zeros((CELL, CELL), np.float32), np.full((CELL, CELL), 1e-6, np.float32)
    for weight, (px, py) in zip(weights.tolist(), ((points.numpy() + 0.5) * scale).tolist()):
        bump = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (0.5 * patch * scale) ** 2))
        heat += weight * bump
        cover += bump
    heat = np.where(cover > 0.05, heat / cover, 0)
    share = np.clip(heat / max(float(np.quantile(heat, 0.99)), 1e-9), 0, 1)[..., None]
    grey = np.asarray(_enlarged(image).convert("L"), dtype=np.float32)[..., None]
    colour = matplotlib.colormaps["inferno"](share[..., 0])[..., :3] * 255
    return Image.fromarray((0.45 * grey + 0.55 * colour).clip(0, 255).astype(np.uint8))


def _sheet(names: list[str], rows: list[list[Any]]) -> str:
    """One row per step, with its name above, as a PNG data URI. The background is transparent, for light and dark pages."""
    gap, head = 6, 22
    width = len(rows[0]) * (CELL + gap) - gap
    sheet = Image.new("RGBA", (width, len(rows) * (CELL + head)), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    for number, (name, row) in enumerate(zip(names, rows)):
        top = number * (CELL + head)
        pen.text((0, top + 4), name, fill=(128, 136, 146, 255), font_size=13)
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * (CELL + gap), top + head))
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
