"""SFace on a packed dataset in plain code, held against tools/evaluate.py: tarfile, Pillow, onnxruntime and numpy, nothing of lvtrain."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np


def embedded(dataset: Path, model: Path) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings float64 [N, d] of a dataset by SFace, image by image, and the labels int64 [N]."""
    import onnxruntime
    from PIL import Image

    images: dict[str, bytes] = {}
    labels: dict[str, int] = {}
    for shard in sorted((dataset / "shards").glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, kind = member.name.partition(".")
                content = archive.extractfile(member)
                assert content is not None
                if kind == "cls":
                    labels[key] = int(content.read())
                else:
                    images[key] = content.read()
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    rows = []
    for key in sorted(images):
        pixels = np.asarray(Image.open(io.BytesIO(images[key])).convert("RGB"), dtype=np.float32)
        (row,) = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})[0]
        rows.append(row / np.linalg.norm(row))
    return np.array(rows, dtype=np.float64), np.array([labels[key] for key in sorted(images)])


def tar_at_far(unit: np.ndarray, labels: np.ndarray, far: float) -> tuple[float, int, int]:
    """The largest TAR of any threshold with FAR at most `far`; and how many genuine and impostor pairs there are."""
    first, second = np.triu_indices(len(unit), 1)
    cosines, same = (unit @ unit.T)[first, second], (labels[first] == labels[second])
    impostors = np.sort(cosines[~same])[::-1]
    threshold = impostors[int(far * len(impostors))]  # the first that must stay below it
    return float((cosines[same] > threshold).mean()), int(same.sum()), int((~same).sum())
