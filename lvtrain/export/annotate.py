"""An ONNX file says what it is: its embedding space, its licence class and its provenance, in the file's metadata."""

from __future__ import annotations

import json
from pathlib import Path

from lvtrain.export.model_card import Card
from lvtrain.weights.model_input import METADATA as INPUT
from lvtrain.weights.model_input import OURS
from lvtrain.weights.provenance import METADATA, from_json
from lvtrain.weights.space import SPACE, TENSORS, graph_digest, narrowed

COMMERCIAL = "lvtrain.commercial"


def annotate(path: Path, card: Card, precision: str) -> Card:
    """Writes the card's facts into the file's metadata, and returns the card that is true of the file.

    Keys: `lvtrain.space`; `lvtrain.commercial`: yes, no or unknown; `lvtrain.provenance`: JSON of licences, dataset and
    its fingerprint, recipe digest, commit and packages; `lvtrain.tensors`: digest of the graph they were written for;
    `lvtrain.input`: how the file takes images, as `--input` of `tools/evaluate.py` is written.

    Args:
        path: an ONNX file.
        card: of the float32 weights.
        precision: of the file. Another one than float32 is another space.
    """
    import onnx

    model = onnx.load(str(path))
    if precision != "float32":
        card = card.narrowed(narrowed(card.space, precision, model.graph), precision)
    found = {
        SPACE: card.space,
        COMMERCIAL: from_json(card.provenance).commercial,
        METADATA: json.dumps(card.provenance),
        TENSORS: graph_digest(model.graph),
        INPUT: f"{OURS.colours} {OURS.range}",
    }
    for key, value in found.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))
    return card
