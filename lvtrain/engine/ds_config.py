"""The DeepSpeed JSON and the recipe as one configuration. What contradicts is refused before any work.

A JSON of `ds_configs/` says how DeepSpeed shards and offloads (`zero_optimization`), and may tune buckets and
communication. The recipe says batch, accumulation, precision, clipping, optimizer and schedule. In the JSON they are
absent or "auto"; a number that agrees with the recipe is accepted.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lvtrain.errors import UserError
from lvtrain.recipe import strict_yaml
from lvtrain.recipe.optimizer import Optimizer
from lvtrain.recipe.sections import Phase

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_NOT_HERE = {
    "optimizer": "the recipe's optimizer section says it",
    "scheduler": "the recipe's schedule section says it",
    "fp16": "float16 needs loss scaling; lvtrain trains in bfloat16 or float32 (optimizer.precision)",
    "amp": "use the recipe's optimizer.precision",
    "bf16": "it would keep the weights in bfloat16; optimizer.precision=bfloat16 uses torch_autocast with float32 weights",
    "checkpoint": "lvtrain writes its own checkpoints (the recipe's checkpoint section)",
    "tensorboard": "the recipe's logging.trackers says it",
    "wandb": "the recipe's logging.trackers says it",
    "zero_force_ds_cpu_optimizer": "torch's own optimizers also update offloaded state, and those are tested",
    "elasticity": "the recipe's micro_batches says which numbers of GPUs train the same batches",
}
_DEPRECATED = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"offload_optimizer": {"device": "cpu", "pin_memory": true}',
}
_UNSUPPORTED = {
    "elastic_checkpoint": "lvtrain writes its own checkpoints, which any number of GPUs reads",
    "zenflow": "lvtrain does not save its state",
    "zero_quantized_weights": "it rounds the weights, but every stage must train alike",
    "zero_quantized_gradients": "it rounds the gradients, but every stage must train alike",
    "zero_quantized_nontrainable_weights": "it rounds the weights, but every stage must train alike",
    "round_robin_gradients": "it trains to other weights under ZeRO-1 and 2",
    "stage3_module_granularity_threshold": "a step fails under it",
    "legacy_stage1": "DeepSpeed has removed it",
}
_TYPES = {
    "zero_optimization": dict,
    "torch_autocast": dict,
    "zero_allow_untested_optimizer": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
}
# what a JSON may tune; anything else is refused, because the start would ignore it or break
_TUNED = (
    *_BATCH,
    "gradient_clipping",
    "torch_autocast",
    "communication_data_type",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
)


def resolve_ds_config(
    source: str | Path | Mapping[str, Any], *, optimizer: Optimizer, phases: Sequence[Phase] = (), world_size: int = 1
) -> dict[str, Any]:
    """Reads a DeepSpeed JSON and fills in what the recipe says. The engine adds the batch, phase by phase.

    Raises:
        UserError: no such file, not JSON, a key that lvtrain does not use, or a value that contradicts the recipe.
    """
    name, config = _read(source)

    def refuse(key: str, why: str) -> UserError:
        return UserError(f'{name}: {key}: {why}; remove it from the JSON or write "auto"')

    for key in [key for key in config if key not in _TUNED]:
        if not _is_off(config.pop(key)):
            if key in _NOT_HERE:
                raise refuse(key, _NOT_HERE[key])
            near = difflib.get_close_matches(key, _TUNED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(_TUNED)}"
            raise UserError(f"{name}: lvtrain does not use {key!r}; {hint}")
    for key, kind in _TYPES.items():
        if config.get(key) in (None, False, "auto"):
            config.pop(key, None)
        elif type(config[key]) is not kind:
            expected = {dict: "a section, {...}", bool: "true or false", int: "a whole number"}[kind]
            raise UserError(f"{name}: {key}: {json.dumps(config[key])} is not {expected}; correct or remove it")

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
    # the engine clips inside the optimizer's kernel; DeepSpeed would make the host wait for the norm
    config["gradient_clipping"] = 0.0
    # DeepSpeed's own count of samples per second makes the host wait for the device twice a step
    config["timers"] = {"throughput": {"enabled": False}}

    config.update(_precision(config, optimizer, refuse))

    if (zero := config.get("zero_optimization")) is None:
        raise UserError(f'{name}: no zero_optimization section; ds_configs/zero1.json shows one: {{"stage": 1}}')
    stage = zero.setdefault("stage", 1)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"{name}: zero_optimization.stage: {stage!r} is not 0, 1, 2 or 3")
    for key, instead in _DEPRECATED.items():
        if zero.pop(key, None):
            raise UserError(f"{name}: zero_optimization.{key} is DeepSpeed's old name; write {instead}")
    for key, why in _UNSUPPORTED.items():
        if not (_is_off(zero.get(key)) or zero[key] == 0):
            raise UserError(f"{name}: zero_optimization.{key}: {why}; remove it from the JSON")
    if zero.get("zero_hpz_partition_size", 1) not in (1, "auto"):
        raise refuse("zero_optimization.zero_hpz_partition_size", "a resumed run has other bits under it; remove it")
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(offload := zero.get(key) or {}, dict):
            raise refuse(f"zero_optimization.{key}", f'{offload!r} is not a section like {{"device": "cpu"}}')
        device = offload.get("device", "none")
        if device not in ("none", "cpu"):
            raise refuse(f"zero_optimization.{key}.device", f'{device!r} is not supported, only "cpu"')
        if offload.get("ratio", 1) != 1:
            raise refuse(f"zero_optimization.{key}.ratio", "torch's own optimizers offload everything or nothing")
    if stage < 3 and not _is_off(zero.get("offload_param")) and zero["offload_param"].get("device") == "cpu":
        raise UserError(
            f"{name}: zero_optimization.offload_param: only stage 3 splits the weights; use stage 3 or remove it"
        )
    if stage in (1, 2) and not zero.get("offload_optimizer"):
        zero["compute_grad_norm"] = False  # the engine does, and keeps it on the device
    # torch's own optimizers also update offloaded state: they are what is tested, and nothing is compiled at the first start
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 2**31)
    return config


def fit_buckets(zero: Mapping[str, Any], elements: int) -> dict[str, Any]:
    """Limits the communication buckets of `zero_optimization` to a model of so many elements.

    DeepSpeed allocates whole buckets, 2 GB by default, in every backward.
    """
    largest = elements + elements % 2  # DeepSpeed needs an even number
    fitted = dict(zero)
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        asked = zero.get(name, "auto")
        fitted[name] = min(500_000_000 if asked == "auto" else int(float(asked)), largest)
    return fitted


def check_with_deepspeed(config: Mapping[str, Any], name: str = "the DeepSpeed JSON") -> None:
    """Builds DeepSpeed's own configuration from a resolved one, as a start does.

    Raises:
        UserError: DeepSpeed refuses it.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    # DeepSpeed requires a batch size; the engine sets the real one at each phase
    whole = json.loads(json.dumps(dict(config))) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
    }
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        DeepSpeedConfig(whole)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(("zero_optimization", *map(str, problem["loc"])))
        raise UserError(f"{name}: {place}: {problem['msg']}; correct or remove it") from error
    except Exception as error:  # DeepSpeed raises whatever its parsing happens to meet
        raise UserError(
            f"{name}: DeepSpeed refuses it: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    finally:
        logger.setLevel(level)


def _is_off(value: Any) -> bool:
    """Whether a setting says nothing: absent, false, "auto", or a section that is not enabled."""
    if isinstance(value, dict):
        return value.get("enabled") in (False, "auto")
    return value in (None, False, "auto")


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
    wire = config.pop("communication_data_type", "auto")
    if wire not in ("auto", "fp32", "bf16"):
        raise refuse("communication_data_type", f'{wire!r} is not "fp32" or "bf16"')
    wire = "fp32" if wire == "auto" else wire
    if optimizer.precision == "float32":
        return {"communication_data_type": wire}
    section: dict[str, Any] = {"enabled": True, "dtype": "bfloat16"}
    if wire == "fp32":
        # otherwise DeepSpeed sums the gradients of Linear and Conv in bfloat16, and a resume on other ranks differs by 1e-3
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
        config = strict_yaml.parse_json(strict_yaml.read_small(path))
    except strict_yaml.StrictError as error:
        raise UserError(f"DeepSpeed config {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"DeepSpeed config {path} must be an object, not {type(config).__name__}")
    return str(path), config
