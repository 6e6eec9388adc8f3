"""From the values of an arcface_torch configuration to a recipe, after the table `arcface_torch.yaml`.

Each key has one function below, which writes its part of the recipe. A value that lvtrain has no place for is listed with
the reason, and the recipe then has what `configs/base.py` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from lvtrain.errors import UserError
from lvtrain.recipe import arcface_torch
from lvtrain.recipe.arcface_config import ArcfaceConfig

_SECRETS = ("wandb_key",)
_NO_PATH = "data/train"  # where a configuration names no folder


@dataclass
class Migration:
    """A recipe, and what did not go into it.

    Attributes:
        recipe: its plain values.
        taken: (line in their file or None for a default, their key, our dotted key).
        not_taken: (line or None, what stands there, why it was not taken).
        remarks: what to know before training, one line each.
    """

    recipe: dict[str, Any]
    taken: list[tuple[int | None, str, str]] = field(default_factory=list)
    not_taken: list[tuple[int | None, str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class _Refused(ValueError):
    """Why a key's value cannot be taken."""


def migrate(config: ArcfaceConfig, *, name: str, gpus: int) -> Migration:
    """The recipe of a configuration.

    Args:
        config: as `read_config` gives it; keys it does not assign have the defaults of configs/base.py.
        name: of the run, where the configuration gives none.
        gpus: of their run; their batch size counts the images of one.

    Raises:
        UserError: their network is not among ours, or the length of training is missing.
    """
    return _Migrator(config, name=name, gpus=gpus).run()


class _Migrator:
    def __init__(self, config: ArcfaceConfig, *, name: str, gpus: int) -> None:
        self.config, self.gpus = config, gpus
        self.keys: dict[str, Any] = arcface_torch.table()["keys"]
        self.defaults = {key: entry["default"] for key, entry in self.keys.items() if "default" in entry}
        self.recipe: dict[str, Any] = {
            "name": re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("._-")[:100] or "migrated",
            "deterministic": False,
            "data": {"path": _NO_PATH},
            "backbone": {},
            "classifier": {"margin": {}, "numerics": "fast", "optimizer": {}},
            "method": "classification",
            "phases": [{"name": "train"}],
            "optimizer": {"name": "sgd"},
            "schedule": {},
            "evaluation": {},
            "logging": {},
        }
        self.found = Migration(self.recipe, not_taken=list(config.not_taken))

    def run(self) -> Migration:
        assigned = self.config.values
        for key in assigned:
            if key not in self.keys:
                self._refuse(key, "lvtrain knows no such key")
        for key, write in _WRITERS.items():
            if key in assigned:
                self._take(key, assigned[key], write)
            elif key in self.defaults:
                write(self, self.defaults[key])
        for key in assigned:
            if key in self.keys and key not in _WRITERS and key not in _READ_BY_OTHERS:
                self._refuse(key, self.keys[key]["how"])
        self._batch()
        self._schedule()
        self._benchmarks()
        self._trackers()
        self.recipe["optimizer"]["decay_norms"] = True
        for section in ("evaluation", "logging"):
            if not self.recipe[section]:
                del self.recipe[section]
        self.found.not_taken.sort(key=lambda entry: entry[0] or 0)
        return self.found

    def _take(self, key: str, value: Any, write: Callable[[_Migrator, Any], None]) -> None:
        try:
            write(self, value)
        except _Refused as reason:
            self._refuse(key, str(reason))
            if key in self.defaults:
                write(self, self.defaults[key])
        else:
            self._took(key)

    def _refuse(self, key: str, reason: str) -> None:
        shown = "..." if key in _SECRETS else _shown(self.config.values[key])
        self.found.not_taken.append((self.config.lines.get(key), f"{key} = {shown}", reason))

    def _given(self, key: str) -> Any:
        """Their value of a key, or the default of configs/base.py, or None."""
        return self.config.values.get(key, self.defaults.get(key))

    def _whole(self, key: str, *, least: int, default: int) -> int:
        """A whole number, or the default where theirs is not one."""
        value = self._given(key)
        try:
            number = _whole(value, least=least) if value is not None else default
        except _Refused as reason:
            self._refuse(key, str(reason))
            number = default
        else:
            if key in self.config.values:
                self._took(key)
        return number

    def _batch(self) -> None:
        """`batch_size` counts the images of one GPU and one micro-batch."""
        batch = self._whole("batch_size", least=1, default=128)
        accumulation = self._whole("gradient_acc", least=1, default=1)
        micro = self.gpus * accumulation
        self.recipe["phases"][0] |= {"global_batch": batch * micro, "micro_batches": micro}
        if accumulation > 1 and self.recipe["optimizer"]["name"] == "sgd":
            self.found.remarks.append(
                f"gradient_acc = {accumulation}: theirs adds the gradients of micro-steps, ours averages them; a rate "
                f"{accumulation} times as high is the same SGD step"
            )

    def _schedule(self) -> None:
        given, schedule = self.config.values, self.recipe["schedule"]
        if "num_epoch" not in given:
            raise UserError(
                "the configuration has no num_epoch that can be read; add config.num_epoch = 20, or your own"
            )
        schedule["total"] = f"{self._whole('num_epoch', least=1, default=20)} epochs"
        if "warmup_epoch" in given:
            warmup = self._whole("warmup_epoch", least=-1, default=0)
            if warmup > 0:
                schedule["warmup"] = f"{warmup} epochs"
        schedule["shape"] = "polynomial"
        if "decay_epoch" in given:
            self._refuse("decay_epoch", self.keys["decay_epoch"]["how"])
            self.recipe["optimizer"]["lr_for_batch"] = 512
            self.found.remarks.append(
                "a configuration of 2021, whose train.py counts lr for a batch of 512: so does optimizer.lr_for_batch"
            )
        self.found.remarks.append(
            "schedule.shape: the rate of train_v2.py falls in a straight line since April 2023; in every log published in "
            "2022 it falls with the square: schedule.shape=quadratic"
        )

    def _benchmarks(self) -> None:
        targets, folder = self._given("val_targets"), self._given("rec")
        every = self._whole("verbose", least=1, default=2000)
        if not isinstance(targets, list) or not all(isinstance(one, str) and one.isprintable() for one in targets):
            self._refuse("val_targets", "it is not a list of names")
            return
        if "val_targets" in self.config.values:
            self._took("val_targets")
        if not targets or self.recipe["data"]["path"] == _NO_PATH:
            return
        accumulation = self.recipe["phases"][0]["micro_batches"] // self.gpus
        self.recipe["evaluation"] = {
            "benchmarks": {one: str(PurePath(folder) / f"{one}.bin") for one in dict.fromkeys(targets)},
            "every": f"{max(1, every // accumulation)} steps",
        }

    def _trackers(self) -> None:
        wandb = {"name": "wandb"}
        for key in ("wandb_project", "wandb_entity"):
            value = self.config.values.get(key)
            if isinstance(value, str) and value:
                wandb[key.removeprefix("wandb_")] = value
                self._took(key)
            elif value is not None:
                self._refuse(key, "it is not a name")
        is_on = self._given("using_wandb")
        if not isinstance(is_on, bool):
            self._refuse("using_wandb", "it is neither True nor False")
        elif is_on:
            self._took("using_wandb")
            self.recipe["logging"]["trackers"] = ["tensorboard", wandb]
            self.found.remarks.append("Weights & Biases: run `wandb login` once, or set WANDB_API_KEY")

    def _took(self, key: str) -> None:
        self.found.taken.append((self.config.lines.get(key), key, self.keys[key].get("ours", "")))


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, list) else f"[{', '.join(map(_shown, value[:4]))}]"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole(value: Any, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise _Refused(f"it is not a whole number of at least {least}")
    return int(value)


def _real(value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused("it is not a number")
    if (
        (above is not None and value <= above)
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        raise _Refused("the number is out of range")
    return float(value)


def _margin(m: _Migrator, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 3:
        raise _Refused("it is not three numbers (m1, m2, m3)")
    m1, m2, m3 = (_real(one, least=0) for one in value)
    margin = m.recipe["classifier"]["margin"]
    if m3 > 0:
        margin |= {"name": "cosface", "m": _real(m3, most=1)}
        if (m1, m2) != (1, 0):
            m.found.remarks.append(
                "margin_list: with m3 above 0 their loss ignores m1 and m2, so the recipe has cosface"
            )
    elif m1 == 1:
        margin |= {"name": "arcface", "m": _real(m2, most=3), "straight_through": True}
    else:
        margin |= {"name": "combined", "m1": _real(m1, least=1), "m2": _real(m2, most=3), "m3": 0.0}
        m.found.remarks.append(
            "margin_list: their loss raises an error for m1 other than 1 with m3 = 0; ours is combined"
        )


def _loss(m: _Migrator, value: Any) -> None:
    """The key of 2021, instead of margin_list."""
    if "margin_list" in m.config.values:
        raise _Refused("margin_list decides")
    if value not in ("arcface", "cosface"):
        raise _Refused("it is neither arcface nor cosface")
    m.recipe["classifier"]["margin"] = {}
    _margin(m, [1.0, 0.5, 0.0] if value == "arcface" else [1.0, 0.0, 0.4])


def _network(m: _Migrator, value: Any) -> None:
    networks = arcface_torch.table()["networks"]
    if not isinstance(value, str) or value not in networks:
        line = m.config.lines.get("network")
        raise UserError(f"line {line}: lvtrain has no network {_shown(value)} of theirs; it has {', '.join(networks)}")
    m.recipe["backbone"]["name"] = networks[value]
    if overrides := arcface_torch.table()["network_overrides"].get(value):
        m.recipe["backbone"]["overrides"] = dict(overrides)


def _sample_rate(m: _Migrator, value: Any) -> None:
    rate = _real(value, least=0, most=1)
    if rate == 0:
        m.found.remarks.append("sample_rate = 0 takes the positive classes only; a rate of 1e-9 does the same")
    m.recipe["phases"][0]["sample_rate"] = rate or 1e-9


def _filter(m: _Migrator, value: Any) -> None:
    if (threshold := _real(value, least=0, most=1)) > 0:
        m.recipe["classifier"]["margin"]["filter_threshold"] = threshold


def _optimizer(m: _Migrator, value: Any) -> None:
    if value not in ("sgd", "adamw"):
        raise _Refused("it is neither sgd nor adamw")
    m.recipe["optimizer"]["name"] = m.recipe["classifier"]["optimizer"]["name"] = value


def _momentum(m: _Migrator, value: Any) -> None:
    if value != 0.9:
        raise _Refused("train_v2.py trains with momentum 0.9, whatever this says")


def _rec(m: _Migrator, value: Any) -> None:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise _Refused("it is not a folder")
    if value == "synthetic":
        raise _Refused("random images only measure speed; tools/benchmark.py does that")
    m.recipe["data"]["path"] = f"data/{PurePath(value).name or 'packed'}"


def _output(m: _Migrator, value: Any) -> None:
    if value is None:
        return
    name = PurePath(value).name if isinstance(value, str) else ""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise _Refused("its last part cannot name a run folder")
    m.recipe["name"] = name


def _set(section: str, key: str, number: Callable[[Any], Any]) -> Callable[[_Migrator, Any], None]:
    def write(m: _Migrator, value: Any) -> None:
        m.recipe[section][key] = number(value)

    return write


def _if_true(section: str, key: str, ours: Any) -> Callable[[_Migrator, Any], None]:
    def write(m: _Migrator, value: Any) -> None:
        if not isinstance(value, bool):
            raise _Refused("it is neither True nor False")
        if value:
            m.recipe.setdefault(section, {})[key] = ours

    return write


def _precision(m: _Migrator, value: Any) -> None:
    if not isinstance(value, bool):
        raise _Refused("it is neither True nor False")
    m.recipe["optimizer"]["precision"] = "bfloat16" if value else "float32"


# in this order: what a later key changes must be there
_WRITERS: dict[str, Callable[[_Migrator, Any], None]] = {
    "margin_list": _margin,
    "loss": _loss,
    "interclass_filtering_threshold": _filter,
    "network": _network,
    "embedding_size": _set("backbone", "embedding_dim", lambda value: _whole(value, least=1)),
    "using_checkpoint": _if_true("backbone", "checkpoint_blocks", "block"),
    "sample_rate": _sample_rate,
    "optimizer": _optimizer,
    "lr": _set("optimizer", "lr", lambda value: _real(value, above=0)),
    "momentum": _momentum,
    "weight_decay": _set("optimizer", "weight_decay", lambda value: _real(value, least=0)),
    "max_grad_norm": _set("optimizer", "clip", lambda value: _real(value, above=0)),
    "fp16": _precision,
    "bf16": _if_true("optimizer", "precision", "bfloat16"),
    "rec": _rec,
    "num_classes": _set("data", "num_classes", lambda value: _whole(value, least=1)),
    "num_image": _set("data", "num_samples", lambda value: _whole(value, least=1)),
    "dali": _if_true("data", "backend", "dali"),
    "dali_aug": _if_true("data", "augmentation", "arcface"),
    "num_workers": _set("data", "threads", lambda value: _whole(value, least=1)),
    "output": _output,
    "seed": lambda m, value: m.recipe.__setitem__("seed", _whole(value, least=0)),
    "resume": _if_true("checkpoint", "resume", "must"),
    "frequent": _set("logging", "every", lambda value: _whole(value, least=1)),
}
_READ_BY_OTHERS = (
    "batch_size",
    "gradient_acc",
    "num_epoch",
    "warmup_epoch",
    "decay_epoch",
    "val_targets",
    "verbose",
    "using_wandb",
    "wandb_project",
    "wandb_entity",
)
