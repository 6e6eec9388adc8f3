"""The model card that goes with exported weights: what it is, what it was trained on, under which licence, how good, for what."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_UNKNOWN = "not stated in dataset.json; find out before you use or share these weights"


@dataclass
class Card:
    name: str
    architecture: str
    embedding_dim: int
    parameters: int
    source: str = ""
    dataset: str = "unknown"
    data_licence: str | None = None
    method: str = "unknown"
    samples_seen: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""


def from_run(run: Path, *, architecture: str, embedding_dim: int, parameters: int) -> Card:
    """What a run folder knows: recipe, dataset licence, newest evaluation."""
    card = Card(run.name, architecture, embedding_dim, parameters, source=f"run {run.name}")
    recipe = run / "recipe.yaml"
    if recipe.is_file():
        import yaml

        card.recipe = recipe.read_text()
        values = yaml.safe_load(card.recipe)
        card.method = values["method"]["name"]
        data = Path(values["data"]["path"])
        card.dataset = data.name
        manifest = (data if data.is_dir() else data.parent) / "dataset.json"
        if manifest.is_file():
            card.data_licence = json.loads(manifest.read_text()).get("licence")
    evaluations = sorted(
        (run / "evaluation").glob("*.json"), key=lambda path: (path.stem == "final", path.stat().st_mtime)
    )
    if evaluations:
        found = json.loads(evaluations[-1].read_text())
        card.samples_seen = found.get("samples_seen")
        card.figures = {name: figures for name, figures in found.get("benchmarks", {}).items()}
    return card


def write_card(path: str | Path, card: Card) -> None:
    """Markdown with the front matter model hubs read."""
    lines = [
        "---",
        "library_name: lvtrain",
        "pipeline_tag: image-feature-extraction",
        "tags: [face-recognition, biometrics]",
        "license: other",
        "---",
        "",
        f"# {card.name}",
        "",
        f"{card.architecture}, {card.parameters / 1e6:.1f} M parameters: an aligned 112x112 RGB face to {card.embedding_dim} numbers whose cosine "
        "tells identity. Not L2-normalised.",
        "",
        "```python",
        "from lvtrain.interop import load_model",
        'model = load_model("THIS_FOLDER")',
        "embeddings = model.forward(images)        # float32 [B, 3, 112, 112], RGB, (x - 127.5) / 127.5",
        "```",
        "",
        "## Training",
        "",
        f"- method: {card.method}" + (f"; {card.samples_seen:,} samples seen" if card.samples_seen else ""),
        f"- data: {card.dataset}",
        f"- licence of the data, which these weights inherit: {card.data_licence or _UNKNOWN}",
        f"- source: {card.source or 'unknown'}",
        "",
        "## Figures",
        "",
        *_figures(card),
        "",
        "## Intended use and limits",
        "",
        "Face embeddings are biometric data. Use them only with a lawful basis and within the licence of the training data; not for covert "
        "surveillance, and not as the only ground of a decision about a person. Accuracy differs between groups of people; measure it on yours. "
        "Inputs must be aligned with the five-point template; unaligned faces give much worse figures.",
    ]
    if card.recipe:
        lines += ["", "## Recipe", "", "```yaml", card.recipe.rstrip(), "```"]
    Path(path).write_text("\n".join(lines) + "\n")


def _figures(card: Card) -> list[str]:
    lines = []
    if card.figures:
        lines += ["| benchmark | accuracy, % | TAR@FAR=1e-3, % | pairs |", "|---|---|---|---|"]
        for name, figures in card.figures.items():
            tar = figures.get("tar_at_far", {}).get("1e-03")
            shown = f"{100 * tar:.2f}" if isinstance(tar, (int, float)) else ""
            lines.append(
                f"| {name} | {100 * figures['accuracy']:.2f} ± {100 * figures['std']:.2f} | {shown} | {figures['pairs']} |"
            )
    else:
        lines.append("none measured")
    for name, value in card.calibration.items():
        lines.append(f"- cosine threshold {name}: {value}")
    return lines
