"""The DeepSpeed JSON and the recipe, made one: what both could say is said in the recipe, and a contradiction is refused before any work.

A JSON of `ds_configs/` says how DeepSpeed shards and offloads (`zero_optimization`) and may tune buckets and communication. Batch,
accumulation, precision, clipping, optimizer and schedule are the recipe's: absent or "auto" in the JSON they are filled in, and a number that
agrees is accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvtrain.errors import UserError
from lvtrain.recipe.optimizer import Optimizer
from lvtrain.recipe.sections import Phase

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NOT_HERE = {
    "optimizer": "the recipe's optimizer section says it",
    "scheduler": "the recipe's schedule section says it",
    "fp16": "float16 needs loss scaling; lvtrain trains in bfloat16 or float32 (optimizer.precision)",
    "amp": "use the recipe's optimizer.precision",
    "checkpoint": "lvtrain writes its own checkpoints (the recipe's checkpoint section)",
}


def resolve_ds_config(
    source: str | Path | Mapping[str, Any], *, optimizer: Optimizer, phases: Sequence[Phase] = (), world_size: int = 1
) -> dict[str, Any]:
    """Reads a DeepSpeed JSON and fills in what the recipe says; the batch stays out, the engine sets it phase by phase.

    Raises:
        UserError: no such file, not JSON, no ZeRO section, a stage other than 0 to 3, offload to NVMe, or something the recipe says differently.
    """
    name, config = _read(source)

    def refuse(key: str, why: str) -> UserError:
        return UserError(f'{name}: {key}: {why}; remove it from the JSON or write "auto"')

    for key, why in _NOT_HERE.items():
        section = config.pop(key, None)
        if section not in (None, "auto") and not (isinstance(section, dict) and section.get("enabled") is False):
            raise refuse(key, why)

    for phase in phases:
        says = {
            "train_batch_size": phase.global_batch,
            "train_micro_batch_size_per_gpu": phase.micro_batch,
            "gradient_accumulation_steps": phase.micro_batches // world_size,
        }
        for key in _BATCH:
            if config.get(key, "auto") not in ("auto", says[key]):
                raise refuse(
                    key, f"{config[key]} but phase {phase.name!r} of the recipe gives {says[key]} on {world_size} ranks"
                )
    for key in _BATCH:
        config.pop(key, None)

    if config.get("gradient_clipping", "auto") not in ("auto", optimizer.clip):
        raise refuse(
            "gradient_clipping", f"{config['gradient_clipping']} but the recipe's optimizer.clip is {optimizer.clip}"
        )
    config["gradient_clipping"] = (
        0.0  # the engine clips, inside AdamW's kernel: DeepSpeed would ask the device for the norm first
    )
    # DeepSpeed's own count of samples a second empties the device's queue twice a step
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)

    bf16 = config.pop("bf16", None)
    if isinstance(bf16, dict) and bf16.get("enabled") is True:
        raise refuse(
            "bf16",
            "it would keep the weights themselves in bfloat16; optimizer.precision=bfloat16 uses torch_autocast with float32 weights",
        )
    config.update(_precision(config, optimizer, refuse))

    if not isinstance(zero := config.get("zero_optimization"), dict):
        raise UserError(f'{name}: no zero_optimization section; ds_configs/zero1.json shows one: {{"stage": 1}}')
    stage = zero.setdefault("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise refuse("zero_optimization.stage", f"{stage!r} is not 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(offload := zero.get(key) or {}, dict):
            raise refuse(f"zero_optimization.{key}", f'{offload!r} is no section like {{"device": "cpu"}}')
        device = offload.get("device", "none")
        if device not in ("none", "cpu"):
            raise refuse(f"zero_optimization.{key}.device", f'{device!r} is not supported, only "cpu"')
    if stage in (1, 2) and not zero.get("offload_optimizer"):
        zero["compute_grad_norm"] = False  # the engine does, and keeps it on the device
    # torch's own AdamW also updates offloaded states: it is what is tested, and nothing is compiled at the first start
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 2**31)
    return config


def _precision(config: dict[str, Any], optimizer: Optimizer, refuse: Any) -> dict[str, Any]:
    autocast = config.pop("torch_autocast", None)
    if isinstance(autocast, dict):
        on = autocast.get("enabled", "auto")
        if on not in ("auto", optimizer.precision == "bfloat16"):
            raise refuse(
                "torch_autocast.enabled", f"{on} but the recipe's optimizer.precision is {optimizer.precision}"
            )
        if autocast.get("dtype", "auto") not in ("auto", "bfloat16"):
            raise refuse("torch_autocast.dtype", "only bfloat16")
    wanted = {"float32": "fp32", "bfloat16": "bf16"}[optimizer.gradient_communication]
    if config.get("communication_data_type", "auto") not in ("auto", wanted):
        raise refuse(
            "communication_data_type",
            f"the recipe's optimizer.gradient_communication is {optimizer.gradient_communication}",
        )
    config.pop("communication_data_type", None)
    if optimizer.precision == "float32":
        return {"communication_data_type": wanted}
    section: dict[str, Any] = {"enabled": True, "dtype": "bfloat16"}
    if optimizer.gradient_communication == "float32":
        # otherwise DeepSpeed reduces the gradients of Linear and Conv in bfloat16, and a resume on other ranks moves by 1e-3
        section["lower_precision_safe_modules"] = []
    return {"torch_autocast": section}


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "ds_config", json.loads(json.dumps(source))
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"DeepSpeed config {path} does not exist; ds_configs has zero1.json, zero2.json, zero3.json, zero3_offload.json"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # of JSON, or of bytes that are no text
        raise UserError(f"DeepSpeed config {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed config {path} must be an object, not {type(config).__name__}")
    return str(path), config
