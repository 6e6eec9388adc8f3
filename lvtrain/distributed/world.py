"""Which rank is this process? Rank, size, device, and the few agreements on the host that a trainer needs.

Ranks may be started by `deepspeed`, `torchrun` or `srun`. If Slurm's variables contradict torch's, that is an error:
otherwise every task could silently train as rank 0 of 1. Everything also works in one process without a process group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lvtrain.distributed.gpu import check_usable, device_index
from lvtrain.errors import UserError

_store: Any = None


@dataclass(frozen=True)
class World:
    """This process among all: its rank, the number of ranks, its rank on the node, its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """What the launcher set: rank, number of ranks, rank on this node, rendezvous address and port."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    launcher: str


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's variables.

    Raises:
        UserError: Slurm and torch variables contradict each other, one is no number or out of range, RANK or WORLD_SIZE is
            set alone, or a launcher started several processes that we do not know.
    """

    def number(name: str, default: int, low: int = 0, high: int = 1 << 31) -> int:
        text = environment.get(name) or str(default)
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise UserError(
                f"{name}={text!r} is not a whole number from {low} to {high}; unset it, or correct the launcher"
            )
        return int(text)

    slurm_tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1, 1), 1)
    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    if "RANK" in environment:
        if "WORLD_SIZE" not in environment:
            raise UserError("RANK is set but WORLD_SIZE is not; start with deepspeed, torchrun or srun")
        world_size = number("WORLD_SIZE", 1, 1)
        if in_step and world_size < slurm_tasks and "TORCHELASTIC_RUN_ID" not in environment:
            raise UserError(
                f"WORLD_SIZE={world_size} in a Slurm step of {slurm_tasks} tasks: several would believe to be one rank and "
                "train on their own; unset RANK and WORLD_SIZE"
            )
        return Launch(
            rank=number("RANK", 0, 0, world_size - 1),
            size=world_size,
            local_rank=number("LOCAL_RANK", 0),
            address=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=number("MASTER_PORT", 29500, 1, 65535),
            launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed",
        )
    if in_step:
        if environment.get("WORLD_SIZE", str(slurm_tasks)) != str(slurm_tasks):
            raise UserError(
                f"WORLD_SIZE={environment['WORLD_SIZE']} contradicts SLURM_NTASKS={slurm_tasks}; unset WORLD_SIZE or start with torchrun"
            )
        return Launch(
            rank=number("SLURM_PROCID", 0, 0, slurm_tasks - 1),
            size=slurm_tasks,
            local_rank=number("SLURM_LOCALID", 0),
            address=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            # below 32768, where systems begin to hand out ports by themselves
            port=number("MASTER_PORT", 20000 + number("SLURM_JOB_ID", 9500) % 12000, 1, 65535),
            launcher="srun",
        )
    for name in ("WORLD_SIZE", *_OF_MPI):
        if number(name, 1) != 1:
            raise UserError(
                f"{name}={environment[name]}, but RANK is not set: each process would train on its own; start with deepspeed, "
                "torchrun or srun"
            )
    return Launch(rank=0, size=1, local_rank=0, address="127.0.0.1", port=0, launcher="python")


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[003-007,9],x1` gives `gpu003`."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if not match:
        raise UserError(f"cannot read the node list {nodelist!r}; set MASTER_ADDR")
    prefix, numbers, suffix = match[1], match[2], match[3] or ""
    return prefix if numbers is None else prefix + re.split("[-,]", numbers)[0] + suffix


def start(timeout_seconds: float = 1800.0) -> World:
    """Chooses this rank's device and opens the process group (nccl on GPUs, gloo without); a single plain process opens none.

    Raises:
        UserError: more ranks on this node than GPUs; GPUs that torch cannot use.
    """
    started = launch()
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index(started.rank, started.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        check_usable()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device = torch.device("cpu")
    # DeepSpeed and torch read these, whichever launcher started this process
    os.environ.update(
        RANK=str(started.rank),
        WORLD_SIZE=str(started.size),
        LOCAL_RANK=str(device.index or 0) if device.type == "cuda" else str(started.local_rank),  # DeepSpeed's device
        MASTER_ADDR=started.address,
        MASTER_PORT=str(started.port or _free_port()),
    )
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                rank=started.rank,
                world_size=started.size,
                timeout=timedelta(seconds=timeout_seconds),
                device_id=device if device.type == "cuda" else None,
            )
        except dist.DistBackendError as error:
            if "Duplicate GPU" not in str(error):
                raise
            raise UserError(
                f"rank {started.rank} shares its GPU with another rank; start as many ranks a node as it has GPUs"
            ) from error
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {os.environ['MASTER_PORT']} of this node is in use, perhaps by another run; "
                "give the launcher another (deepspeed and torchrun: --master_port)"
            ) from error
    global _store
    _store = dist.distributed_c10d._get_default_store()  # outlives the process group, which an error closes
    return World(started.rank, started.size, started.local_rank, device)


def have_met() -> bool:
    """Whether the ranks of this start have found each other."""
    return _store is not None


def forget() -> None:
    """Ends what `have_met` says: a later start in this process has not met its ranks yet."""
    global _store
    _store = None


def is_first_to_say(line: str, error: BaseException) -> bool:
    """Whether this rank prints `line`: if several ranks fail in the same way, one prints it.

    A rank that cannot reach rank 0 prints it, too.
    """
    if getattr(error, "is_on_every_rank", False):
        return int(os.environ.get("RANK", "0")) == 0
    try:
        _store.set_timeout(timedelta(seconds=5))
        return bool(_store.add(f"said/{line}", 1) == 1)
    except RuntimeError:  # rank 0, who keeps the store, is gone
        return True


def stop() -> None:
    """Closes the process group; gloo aborts at exit otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


def alone() -> World:
    """A world of one, without a process group, on the best device here."""
    return World(0, 1, 0, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of every rank's tensor, on every rank; a collective."""
    if not _several():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a host tensor to `device`. The host does not wait for a GPU, which reads page-locked memory by itself."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank; a collective."""
    if not _several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(action: Callable[[], Any]) -> Any:
    """Rank 0's result on every rank. What it raises there is raised on every rank. A collective."""
    answer: tuple[Any, Exception | None] = (None, None)
    if not _several() or dist.get_rank() == 0:
        try:
            answer = (action(), None)
        except Exception as error:
            answer = (None, error)
    value, failure = broadcast_object(answer)
    if failure is not None:
        failure.is_on_every_rank = True  # type: ignore[attr-defined]
        raise failure
    return value


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank; a collective."""
    if not _several():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def barrier() -> None:
    """Waits until every rank is here. A collective."""
    if _several():
        dist.barrier()
