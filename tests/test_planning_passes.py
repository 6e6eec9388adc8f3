"""The bytes that the planner charges for the classifier's passes, against the operations that PyTorch dispatches for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lvtrain.classifier.classes import Classes
from lvtrain.classifier.numerics import Numerics
from lvtrain.classifier.passes import forward_pass, weight_gradient_pass
from lvtrain.planning import ClassCentres
from lvtrain.planning.passes import both_passes, first_pass

BATCH, CLASSES, DIM = 640, 4096, 512
UNTOUCHED = ("empty", "new_empty", "empty_like", "device", "detach")
SPARSE = ("gather", "scatter_", "index", "index_add_")  # they touch as many elements as the batch has images
OVERWRITES = ("copy_", "fill_", "zero_")


class Moved(TorchDispatchMode):
    """Bytes read and written by each operation on tensors of the chunk's logits, class centres and embeddings."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.bytes = dict.fromkeys(("logit", "row", "image"), 0.0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema = function._schema
        name = schema.name.split("::")[1]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if name in (*UNTOUCHED, *SPARSE) or is_view:
            return result
        if name == "index_select":  # it reads what it writes, and not the rest of its source
            self._add(result, 2)
            return result
        written = False
        for place, argument in enumerate(schema.arguments):
            tensor = kwargs.get(argument.name) if argument.kwarg_only else args[place] if place < len(args) else None
            if not isinstance(tensor, torch.Tensor):
                continue
            is_target = argument.alias_info is not None and argument.alias_info.is_write
            written |= is_target
            is_source = not is_target or (argument.name == "self" and name not in OVERWRITES)
            self._add(tensor, is_target + is_source)
        if not written and isinstance(result, torch.Tensor):
            self._add(result, 1)
        return result

    def _add(self, tensor: torch.Tensor, times: int) -> None:
        kinds = {(BATCH, self.chunk): "logit", (self.chunk, DIM): "row", (BATCH, DIM): "image"}
        shape = tuple(tensor.shape)
        if kind := kinds.get(shape) or kinds.get(shape[::-1]):
            self.bytes[kind] += times * tensor.numel() * tensor.element_size()


def count(chunk: int, keep_mb: float, precision: Any, sampled: bool = False, **settings: Any) -> dict[str, dict[str, float]]:  # fmt: skip
    """Bytes of each pass on a GPU that is not there: fake tensors have shapes and formats, but no memory."""
    with FakeTensorMode():
        weight = torch.empty(CLASSES * (10 if sampled else 1), DIM, device="cuda")
        indices = torch.zeros(CLASSES, dtype=torch.int64, device="cuda") if sampled else None
        numerics = Numerics(precision=precision, kernel="torch", chunk=chunk, keep_mb=keep_mb)
        classes = Classes(weight, 64.0, indices, numerics=numerics, **settings)
        embeddings, each = torch.empty(BATCH, DIM, device="cuda"), torch.empty(BATCH, device="cuda")
        positions = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        running = classes.needs_running_max(2_059_906)
        assert running == ClassCentres(2_059_906, precision=precision).follows_maximum
        with Moved(chunk) as first:
            part = forward_pass(classes, embeddings, positions, running=running, need_weighted=True)
        with Moved(chunk) as second:
            out = torch.empty(CLASSES, DIM, device="cuda")
            weight_gradient_pass(
                classes, embeddings, positions, each, each, each, out=out, running=running, kept=part.kept
            )
    return {"first": first.bytes, "second": second.bytes}


def of_each(precision: Any, keep_mb: float, **settings: Any) -> dict[str, dict[str, float]]:
    """Bytes for one element, as `PassBytes` has them; of the embeddings only what every further chunk adds."""
    size = {"logit": BATCH * CLASSES, "row": CLASSES * DIM, "image": BATCH * DIM}
    few, many = (count(chunk, keep_mb, precision, **settings) for chunk in (CLASSES // 2, CLASSES // 4))
    return {
        which: {
            "logit": few[which]["logit"] / size["logit"],
            "row": few[which]["row"] / size["row"],
            "image": (many[which]["image"] - few[which]["image"]) / 2 / size["image"],
        }
        for which in few
    }


@pytest.mark.parametrize("precision", ["half", "bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("kept", [True, False])
def test_bytes_of_the_torch_path_are_those_of_its_operations(precision: Any, kept: bool) -> None:
    found = of_each(precision, 1e6 if kept else 0.0)
    classes = ClassCentres(2_059_906, precision=precision)
    first, both = first_pass(classes), both_passes(classes, float(kept))
    assert vars(first) == pytest.approx(found["first"])
    assert vars(both) == pytest.approx({key: found["first"][key] + found["second"][key] for key in found["first"]})


def test_what_unit_vectors_a_filter_and_sampling_change() -> None:
    classes = ClassCentres(2_059_906)
    assert vars(first_pass(classes, unit=True)) == pytest.approx(of_each("half", 1e6, is_unit=True)["first"])
    filtered = of_each("half", 1e6, threshold=0.4)["first"]["logit"]
    assert first_pass(ClassCentres(2_059_906, filtered=True)).logit == pytest.approx(filtered)
    few = ClassCentres(2_059_906, sample_rate=0.1)
    assert first_pass(few).row == pytest.approx(of_each("half", 1e6, sampled=True)["first"]["row"])


def test_the_fused_path_by_hand() -> None:
    """One kernel for all that stands between the matmuls: 12 bytes a logit where PyTorch moves 36, and 2 more in the second pass."""
    fused, plain = ClassCentres(2_059_906, kernel="triton"), ClassCentres(2_059_906)
    assert (first_pass(fused).logit, first_pass(plain).logit) == (12, 36)
    assert (both_passes(fused, 1.0).logit, both_passes(plain, 1.0).logit) == (14, 38)
    assert both_passes(fused, 0.0).logit == 24
