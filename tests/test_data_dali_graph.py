"""DALI's graph for a GPU against DALI's own schema of each operator, on a machine that has no GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lvtrain.data.augment import SETS
from lvtrain.data.decoding.job import DecodeSpec

dali = pytest.importorskip("lvtrain.data.decoding.dali")


def graph(name: str, stored_size: tuple[int, int] | None) -> Any:
    spec = DecodeSpec(SETS[name], 112, stored_size, micro_batch=4, device=torch.device("cuda", 0), threads=1, depth=2)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")  # DALI warns of old names, and drops them
        pipeline = dali.graph_of(spec)
        pipeline._build_graph()
    pipeline.warned = [str(each.message) for each in warned if issubclass(each.category, DeprecationWarning)]
    return pipeline


def operators(pipeline: Any) -> list[tuple[Any, str, Any, set[str]]]:
    """(schema, device, spec, names of the arguments) of each."""
    found = []
    for instance in pipeline._ops:
        operator = instance._op
        names = {name for name in (operator._init_args | operator._call_args) if not name.startswith("_")}
        fed = {line.split(":")[0].strip() for line in str(instance._spec).splitlines() if ": " in line}
        schema = operator._schema
        names |= {name for name in fed if not name.startswith("_") and schema.HasArgument(name)}
        found.append((schema, operator._device, instance._spec, names))
    return found


def problems(pipeline: Any) -> list[str]:
    """What DALI's schemas have against the graph."""
    found = list(pipeline.warned)
    for schema, device, spec, names in operators(pipeline):
        here = schema.OperatorName()
        try:
            schema.CheckArgs(spec)  # unknown arguments, and required ones that are missing
        except RuntimeError as error:
            found.append(f"{here}: {error}")
        if device not in schema.GetSupportedBackends():
            found.append(f"{here}: not on {device}")
        if schema.IsDeprecated():
            found.append(f"{here}: deprecated")
        found += [f"{here}: {name} is deprecated" for name in names if schema.IsDeprecatedArg(name)]
        found += [f"{here}: no argument {name}" for name in names if not schema.HasArgument(name)]
    return found


@pytest.mark.parametrize("name", SETS)
def test_the_gpu_graph_has_dalis_arguments(name: str) -> None:
    pipeline = graph(name, (112, 112))
    assert problems(pipeline) == []
    devices = [(schema.OperatorName(), device) for schema, device, _, _ in operators(pipeline)]
    images = ("Resize", "WarpAffine", "ColorTwist", "GaussianBlur", "Erase", "CropMirrorNormalize")
    assert {device for operator, device in devices if operator in images} == {"gpu"}
    assert [operator for operator, device in devices if device == "mixed"] == ["Image"]


def test_images_of_any_size_are_resized_on_the_gpu() -> None:
    found = [(schema.OperatorName(), device) for schema, device, _, _ in operators(graph("flip", None))]
    assert ("Resize", "gpu") in found


@pytest.mark.parametrize(
    "changed", [{"mirrored": 1}, {"mean": "grey"}, {"image_type": 0}]
)  # unknown, a text, an old name
def test_other_arguments_are_refused(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed:
        def __getattr__(self, name: str) -> Any:
            return getattr(dali.dali_fn, name)

        def crop_mirror_normalize(self, image: Any, **given: Any) -> Any:
            return dali.dali_fn.crop_mirror_normalize(image, **(given | changed))

    monkeypatch.setattr(dali, "fn", Changed())
    try:
        found = problems(graph("flip", (112, 112)))
    except Exception as error:  # of several kinds
        found = [str(error)]
    assert any(next(iter(changed)) in problem or "grey" in problem for problem in found), found
