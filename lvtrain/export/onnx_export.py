"""A backbone as ONNX, as the field's clients expect it, checked after writing.

The contract: one file, one input `data` float32 `[batch, 3, H, W]` with a symbolic batch, one output `embedding` float32 `[batch, d]` with the
same symbol, RGB, (x - 127.5) / 127.5 done outside, not normalised. float32 initialisers unless asked otherwise.

Opset 18 and above go through torch's present exporter, 14 to 17 through its older TorchScript one: opset 14 is what MFR-Ongoing's runtime reads.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lvtrain.errors import UserError
from lvtrain.weights.models import load_model
from lvtrain.weights.onnx.file import session

INPUT, OUTPUT = "data", "embedding"
OPSETS = range(14, 21)
_LARGEST = 2_000_000_000  # bytes: protobuf's limit for one file


@dataclass(frozen=True)
class Parity:
    """The difference between the file and torch, over random images and all batch sizes.

    Attributes:
        batches: the batch sizes.
        largest_difference: relative to the largest value of the embedding, if that is above 1.
        smallest_cosine: of the embeddings.
    """

    batches: tuple[int, ...]
    largest_difference: float
    smallest_cosine: float

    def __str__(self) -> str:
        return f"largest difference {self.largest_difference:.1e}, cosine at least {self.smallest_cosine:.7f} (N = {self.batches})"


def export_onnx(
    backbone: nn.Module, path: str | Path, *, image_size: int = 112, opset: int = 18, batch: int | None = None
) -> Parity:
    """Writes one ONNX file and compares it with torch in onnxruntime at N = 1, 7 and 32.

    Args:
        backbone: the network; it is moved to the CPU, in float32.
        path: file to write.
        image_size: pixels per side.
        opset: of ONNX, one of `OPSETS`.
        batch: images in a call of the file, always exactly this many, as compilers for small devices need; None = any
            number.

    Raises:
        UserError: more weights than one ONNX file holds (2 GB), an opset outside `OPSETS` or without an operator of the
            backbone, or a file that differs from torch by more than 1e-4.
    """
    path = Path(path)
    if opset not in OPSETS:
        raise UserError(f"opset {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    size = sum(p.numel() * 4 for p in backbone.parameters())
    if size > _LARGEST:
        raise UserError(
            f"{size / 1e9:.1f} GB of weights do not fit one ONNX file (2 GB); export to safetensors instead"
        )
    backbone = backbone.float().cpu().eval()
    example = torch.zeros(batch or 2, 3, image_size, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        (_write if opset >= 18 else _write_old)(backbone, example, path, opset, batch is None)
    parity = compare(backbone, path, image_size=image_size, batches=(batch,) if batch else (1, 7, 32))
    if parity.largest_difference > 1e-4:
        raise UserError(
            f"{path.name} differs from torch by {parity.largest_difference:.2e}, more than 1e-4; do not use it"
        )
    return parity


def _write(backbone: nn.Module, example: torch.Tensor, path: Path, opset: int, any_batch: bool) -> None:
    program = torch.onnx.export(
        backbone,
        (example,),
        dynamo=True,
        external_data=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if any_batch else None,
        opset_version=opset,
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


def _write_old(backbone: nn.Module, example: torch.Tensor, path: Path, opset: int, any_batch: bool) -> None:
    batch = {0: "batch"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints whole graphs when it fails
            torch.onnx.export(
                backbone,
                (example,),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: batch, OUTPUT: batch} if any_batch else None,
            )
        session(path)(example[: 1 if any_batch else None].numpy())
    except Exception as error:  # an operator the opset lacks, or a tracing that has fixed the batch: the exporter has many kinds of errors
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"opset {opset} cannot express this backbone ({reason}); use opset 18 or above") from error


def compare(
    backbone: nn.Module,
    path: str | Path,
    *,
    image_size: int = 112,
    batches: Sequence[int] = (1, 7, 32),
    images: torch.Tensor | None = None,
) -> Parity:
    """Compares torch with onnxruntime on random images, or on `images` [N, 3, S, S], `batches[0]` at a time.

    Raises:
        UserError: the file cannot be run, or gives NaN or infinity.
    """
    run = session(path)
    difference, cosine = 0.0, 1.0
    generator = torch.Generator().manual_seed(0)
    if images is None:
        parts = [torch.rand(batch, 3, image_size, image_size, generator=generator) * 2 - 1 for batch in batches]
    else:
        parts = [part for part in images.split(batches[0]) if len(part) == batches[0]]
    for part in parts:
        with torch.no_grad():
            ours = backbone(part).numpy()
        theirs = run(part.numpy())
        if not np.isfinite(theirs).all():
            raise UserError(
                f"{Path(path).name} gives NaN or infinity; the model has diverged, or the precision is too low for it"
            )
        difference = max(difference, float(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max())))
        lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
        # an embedding of zeros, as int8 can give, has no direction: cosine 0
        cosine = min(cosine, float(((ours * theirs).sum(1) / np.maximum(lengths, 1e-12)).min()))
    return Parity(tuple(batches), difference, cosine)


def accuracies(
    backbone: nn.Module, path: str | Path, benchmark: str | Path, *, image_size: int = 112
) -> tuple[float, float]:
    """Ten-fold verification accuracy on a `.bin` set, of the backbone and of the file."""
    from lvtrain.distributed.world import World
    from lvtrain.evaluation.benchmarks import verify_set
    from lvtrain.weights.extract import Setting

    cpu = torch.device("cpu")

    def accuracy(forward: Callable[[torch.Tensor], torch.Tensor]) -> float:
        found = verify_set(forward, benchmark, Setting(World(0, 1, 0, cpu), cpu, 32, image_size))
        return float(found["accuracy"])

    return accuracy(backbone), accuracy(load_model(path).forward)


def to_float16(source: str | Path, target: str | Path) -> None:
    """float16 weights behind float32 input and output: half the size. MFR-Ongoing's rules refuse such a file."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(target))


def to_int8(source: str | Path, target: str | Path) -> None:
    """Dynamically quantised int8 linears."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    # the exporter's intermediate shapes name symbols the quantiser cannot follow
    del model.graph.value_info[:]
    stripped = Path(target).with_suffix(".stripped.onnx")
    onnx.save(model, str(stripped))
    try:
        quantize_dynamic(str(stripped), str(target), weight_type=QuantType.QInt8)
    finally:
        stripped.unlink()
