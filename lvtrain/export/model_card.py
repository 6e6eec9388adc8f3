"""The model card that goes with exported weights: data, licence, results, intended use and thresholds.

An exported folder keeps the card's fields in its `config.json`, so that a card can be written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lvtrain.errors import UserError
from lvtrain.files.atomic import write_json, write_text
from lvtrain.files.reading import parse_json
from lvtrain.methods import method_title
from lvtrain.recipe import files as recipes
from lvtrain.weights.architecture import Architecture
from lvtrain.weights.provenance import data_licence, from_json, provenance_of
from lvtrain.weights.source import CONFIG
from lvtrain.weights.space import space_at

CALIBRATION = "calibration.json"  # in a run's folder, until the run is exported
_UNKNOWN = "not stated in dataset.json; find out before you use or share these weights"


@dataclass
class Card:
    """What a model card says.

    Attributes:
        figures: benchmark name -> result of `lvtrain.evaluation`.
        calibration: name of a labelled set or of pairs -> result of its `calibrate`.
        space: identifier of the embedding space (`lvtrain.weights.space`).
        provenance: `Provenance.as_json()`; empty in cards of version 0.1.
    """

    name: str
    architecture: str
    embedding_dim: int
    parameters: int
    source: str = ""
    dataset: str = "unknown"
    data_licence: str | None = None
    made_from: list[str] = field(default_factory=list)  # other weights used in training: initial ones, a teacher
    method: str = "unknown"
    samples_seen: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    stale: str = ""  # why thresholds that were found are not in the card
    space: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def narrowed(self, space: str, precision: str) -> Card:
        """The card of a file of another precision: what was measured with the float32 weights is left out."""
        reason = f"thresholds and figures were found in the space {self.space}, before the weights became {precision}"
        return replace(self, space=space, figures={}, calibration={}, stale=reason)


def for_weights(source: Path, architecture: Architecture, state: Mapping[str, torch.Tensor], weights: str) -> Card:
    """The card of the weights at `source`: an exported folder's, a run's, or one with only what the weights show."""
    if source.is_dir() and (card := from_folder(source)) is not None:
        card.space, card.provenance = space_at(source, state), provenance_of(source).as_json()
        return card
    run = run_of(source)
    if run is None:
        return bare(source.name, architecture, state, weights, path=source)
    card = bare(run.name, architecture, state, f"run {run.name}, {weights}", path=source)
    _add_run(card, run, weights)
    return card


def run_of(source: Path) -> Path | None:
    """The run folder that `source` is, or is a checkpoint of; None for anything else, also if it lies in a run."""
    source = source.absolute()
    run = source.parent.parent if source.parent.name == "checkpoints" else source
    return run if (run / "recipe.yaml").is_file() else None


def bare(
    name: str,
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    source: str,
    *,
    path: Path,
    licence: str | None = None,
) -> Card:
    """Returns the card of weights of which nothing else is known.

    Args:
        name: title of the card.
        architecture: of the backbone.
        state: the weights by name.
        source: where they come from, in words.
        path: the file or folder they were read from.
        licence: of their data, from the user.
    """
    parameters = sum(tensor.numel() for tensor in state.values())
    card = Card(name, architecture.name, architecture.embedding_dim, parameters, source, data_licence=licence)
    card.space = space_at(path, state)
    card.provenance = provenance_of(path, stated=licence).as_json()
    return card


def _add_run(card: Card, run: Path, weights: str) -> None:
    """Adds what the run folder records: recipe, licence of the data, and results and thresholds found with these `weights`."""
    card.recipe = (run / "recipe.yaml").read_text()
    values = recipes.of_run(card.recipe)
    data = Path(values["data"]["path"])
    card.method, card.dataset = method_title(values["method"]["name"]), data.name
    card.data_licence = data_licence(run, data)
    parts = {"begun from": values.get("init_from"), "distilled from": values["method"].get("distill")}
    card.made_from = [f"{how} {part.get('path') or part.get('teacher')}" for how, part in parts.items() if part]
    for file in (run / "evaluation").glob("*.json"):
        found = parse_json(file.read_text())
        which = f"step {found.get('step')}, phase {found.get('phase')}"
        for key, name in (("benchmarks", which), ("benchmarks_ema", f"{which}, moving average")):
            if name == weights and key in found:
                card.samples_seen, card.figures = found.get("samples_seen"), found[key]
    if (run / CALIBRATION).is_file():
        kept = parse_json((run / CALIBRATION).read_text())
        if kept["weights"] == weights:
            card.calibration = kept["sets"]
        else:
            card.stale = f"thresholds were found with other weights ({kept['weights']}); these are {weights}"


def from_folder(folder: Path) -> Card | None:
    """The card of an exported folder; None where it has none (another program's folder)."""
    config = folder / CONFIG
    fields = parse_json(config.read_text()).get("lvtrain", {}).get("card") if config.is_file() else None
    if not fields:
        return None
    return Card(**{name: value for name, value in fields.items() if name in Card.__dataclass_fields__})


def keep_calibration(model: Path, weights: str, found: dict[str, Any]) -> Path | None:
    """Saves thresholds for the model card: in a run's `calibration.json`, or in an exported folder's card.

    `weights` says which of a run's weights were calibrated (step and phase), `found` has a result of `calibrate` for each set's name; results of sets
    calibrated before with the same weights stay. Returns the file written, None for a model that has no card (one file, an ONNX file, a checkpoint).
    """
    if (model / "recipe.yaml").is_file():
        path = model / CALIBRATION
        try:
            before = parse_json(path.read_text()) if path.is_file() else {}
        except ValueError:
            raise UserError(f"{path} cannot be read; remove it, and calibrate again what it held") from None
        sets = before["sets"] if before.get("weights") == weights else {}
        write_json(path, {"weights": weights, "sets": {**sets, **found}}, indent=1)
        return path
    card = from_folder(model) if model.is_dir() else None
    if card is None:
        return None
    card.calibration.update(found)
    config = parse_json((model / CONFIG).read_text())
    config["lvtrain"]["card"] = asdict(card)
    write_json(model / CONFIG, config, indent=2)
    write_card(model / "README.md", card)
    return model / "README.md"


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
        "import lvtrain",
        'model = lvtrain.load_model("THIS_FOLDER")',
        'embeddings = model.embed(["a.jpg"])  # aligned faces; float32 [N, d], L2-normalised',
        "embeddings = model(images)           # float32 [B, 3, 112, 112], RGB, (x - 127.5) / 127.5; not normalised",
        *(
            []
            if "resnet" in card.architecture
            else ["tokens, embeddings = model.tokens(images)  # patch tokens [B, N, dim] too"]
        ),
        "```",
        "",
        "## Training",
        "",
        f"- method: {card.method}" + (f"; {card.samples_seen:,} samples seen" if card.samples_seen else ""),
        f"- data: {card.dataset}",
        f"- licence of the data, which these weights inherit: {card.data_licence or _UNKNOWN}",
        *(f"- {part}: these weights inherit the conditions of its data, too" for part in card.made_from),
        f"- source: {card.source or 'unknown'}",
        "",
        "## Provenance",
        "",
        *_provenance(card),
        "",
        "## Figures",
        "",
        *_figures(card),
        "",
        "## Thresholds",
        "",
        *_thresholds(card),
        "",
        "## Intended use and limits",
        "",
        "Face embeddings are biometric data. Use them only with a lawful basis and within the licence of the training data; not for covert "
        "surveillance, and not as the only ground of a decision about a person. Accuracy differs between groups; measure it on yours. "
        "Inputs must be aligned with the five-point template; unaligned faces give much worse figures.",
    ]
    if card.recipe:
        lines += ["", "## Recipe", "", "```yaml", card.recipe.rstrip(), "```"]
    write_text(Path(path), "\n".join(lines) + "\n")


def _provenance(card: Card) -> list[str]:
    found = from_json(card.provenance)
    lines = [
        f"- embedding space: `{card.space or 'unknown'}`; compare only embeddings of this space",
        f"- commercial use, by what the licences say: **{found.commercial}**",
        *(f"  - {terms}" for terms in found.licences),
    ]
    facts = {
        "dataset fingerprint": found.fingerprint,
        "recipe digest": found.recipe,
        "lvtrain commit": found.commit,
        "packages": ", ".join(f"{name} {version}" for name, version in found.packages.items()),
    }
    return lines + [f"- {what}: {value}" for what, value in facts.items() if value]


def _figures(card: Card) -> list[str]:
    if not card.figures:
        return ["none measured with these weights"]
    verified = {name: figures for name, figures in card.figures.items() if "accuracy" in figures}
    lines = ["| benchmark | accuracy, % | TAR@FAR=1e-3, % | pairs |", "|---|---|---|---|"] if verified else []
    for name, figures in verified.items():
        tar = figures.get("tar_at_far", {}).get("1e-03")
        shown = f"{100 * tar:.2f}" if isinstance(tar, (int, float)) else ""
        lines.append(
            f"| {name} | {100 * figures['accuracy']:.2f} ± {100 * figures['std']:.2f} | {shown} | {figures['pairs']} |"
        )
    return [*lines, *_further_figures(card)]


def _further_figures(card: Card) -> list[str]:
    """A table of the other protocols' figures, and of error rates by group."""
    from lvtrain.evaluation import shown  # imports plotting libraries, which most cards do not need
    from lvtrain.evaluation.protocol import PROTOCOLS

    rows = []
    for name, figures in card.figures.items():
        kind = figures.get("kind", "verification")
        if kind not in PROTOCOLS.names():
            continue
        found = shown.group_lines(figures) if kind == "verification" else PROTOCOLS.get(kind).headline(figures)
        rows += [f"| {name} | {PROTOCOLS.get(kind).title} | {figure} | {value} |" for figure, value in found]
    head = ["| benchmark | protocol | figure | value |", "|---|---|---|---|"]
    return ["", *head, *rows] if rows else []


def _thresholds(card: Card) -> list[str]:
    if not card.calibration:
        return [card.stale or "none found; `tools/evaluate.py MODEL --benchmark NAME:calibration:PATH` finds them"]
    lines = [
        "Cosine of two single images (no mirror image) at or above which a share FMR of impostor pairs is accepted.",
        "",
        "| calibrated on | FMR | cosine at least | interval | pairs of one person refused, % |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for name, found in card.calibration.items():
        for fmr, at in found["thresholds"].items():
            interval = f"{at['low']:.4f} to {at['high']:.4f}"
            lines.append(f"| {name} | {fmr} | {at['threshold']:.4f} | {interval} | {100 * at['fnmr']:.2f} |")
        pairs = f"{found['impostor_pairs']:,} impostor and {found['genuine_pairs']:,} genuine pairs"
        unresolved = f"; too few pairs for {', '.join(found['unresolved'])}" if found["unresolved"] else ""
        notes.append(f"- {name}: {pairs}, {100 * found['confidence']:.0f} % interval by {found['method']}{unresolved}")
    return [*lines, "", *notes]
