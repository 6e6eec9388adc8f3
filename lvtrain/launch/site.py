"""Settings that differ from cluster to cluster, read from `LVTRAIN_*` variables (slurm/site.env sets them)."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lvtrain.errors import UserError


@dataclass(frozen=True)
class Site:
    """One field for each variable: `LVTRAIN_` and the field's name in capitals. Empty: Slurm's default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    nodes: int = 1
    gpus_per_node: int = 8  # 0: CPU nodes
    tasks_per_node: int = 0  # 0: one per GPU, or one on a CPU node
    cpus_per_task: int = 0
    memory: str = ""  # of a node, Slurm's notation; "0" is all of it
    time: str = "24:00:00"
    signal_seconds: int = 300  # the warning before the time limit; Slurm may send it up to a minute earlier
    chain: str = "requeue"  # or singleton:N
    hold_seconds: int = 60  # after a crash without progress, doubled after the next
    sbatch: str = ""  # further sbatch options
    srun: str = ""  # further srun options, such as --container-image=...
    container: str = ""  # a command put before python in every task, such as apptainer exec --nv lvtrain.sif
    python: str = ".venv/bin/python"  # of the tasks, inside the container if there is one
    launch_python: str = ""  # of the batch script, outside the container; empty: the one that submits
    site: str = "slurm/site.env"  # sourced again by each job
    modules: str = ""  # environment modules each job loads
    setup: str = ""  # a shell file each job sources
    overrides: str = ""  # section.key=value words for every recipe, such as runs=/scratch/me/runs

    @property
    def tasks(self) -> int:
        """Tasks on a node: by default one per GPU."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks

    @property
    def links(self) -> int:
        """Jobs submitted in advance for each phase in singleton mode; 0 in requeue mode."""
        if self.chain == "requeue":
            return 0
        match = re.fullmatch(r"singleton:([1-9]\d*)", self.chain)
        if not match:
            raise UserError(
                f"LVTRAIN_CHAIN is {self.chain!r}; it must be requeue, or singleton:N with N jobs per phase"
            )
        return int(match[1])

    def words(self, name: str) -> list[str]:
        """The words of a setting that holds several (sbatch, srun, container, overrides), split as a shell does."""
        try:
            return shlex.split(getattr(self, name))
        except ValueError as error:
            raise UserError(f"LVTRAIN_{name.upper()} is {getattr(self, name)!r}: {error}") from error


def read_site(environment: Mapping[str, str] = os.environ) -> Site:
    """The settings of this site. Partition and account default to those of the submitting job, if there is one.

    Raises:
        UserError: a value that is not a number where one is needed, or a chain mode that does not exist.
    """
    values: dict[str, str | int] = {}
    for field in fields(Site):
        name = "LVTRAIN_" + field.name.upper()
        text = environment.get(name, "")
        if text == "":
            continue
        if isinstance(field.default, int):
            if not re.fullmatch(r"\d+", text):
                raise UserError(f"{name} is {text!r}; it must be a whole number")
            values[field.name] = int(text)
        else:
            values[field.name] = text
    for name in ("partition", "account"):
        inherited = environment.get(f"SLURM_JOB_{name.upper()}")
        if name not in values and inherited:
            values[name] = inherited
    site = Site(**values)  # type: ignore[arg-type]
    if site.nodes < 1:
        raise UserError("LVTRAIN_NODES is 0; it must be at least 1")
    # check these now, not in the job
    _ = site.links, [site.words(name) for name in ("sbatch", "srun", "container", "overrides")]
    return site
