"""Preflight: can these ranks train together? `tools/preflight.py` runs it on every rank before a long run.

It compares the ranks' software and devices, checks that they share the run folder and see the same data, and measures
the collectives that a training step consists of.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lvtrain.distributed import network
from lvtrain.distributed import world as worlds
from lvtrain.distributed.environment import version_of
from lvtrain.errors import UserError
from lvtrain.files.atomic import write_json

_PACKAGES = ("torch", "deepspeed", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
_SLOW = 0.5  # of what the plan assumes between nodes


def facts() -> dict[str, Any]:
    """This rank's host, and the software and device that should be the same on all ranks."""
    found: dict[str, Any] = {"host": socket.gethostname(), "python": platform.python_version()}
    found |= {name: version_of(name) or "absent" for name in _PACKAGES}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def differences(ranks: list[dict[str, Any]]) -> list[str]:
    """One line for everything, except the host, that is not the same on all ranks."""
    lines = []
    for key in ranks[0]:
        values: dict[str, list[int]] = {}
        for rank, one in enumerate(ranks):
            values.setdefault(str(one.get(key)), []).append(rank)
        if key != "host" and len(values) > 1:
            said = "; ".join(f"{value} on {_some(ranks, where)}" for value, where in values.items())
            lines.append(f"{key} differs: {said}. Install the same on every node (constraints.txt)")
    return lines


def unshared(folder: Path, ranks: list[dict[str, Any]], *, seconds: float = 15) -> list[str]:
    """One line if ranks do not see what rank 0 writes to `folder`, which must be shared by all nodes. A collective."""
    token = worlds.broadcast_object(uuid.uuid4().hex)

    def write() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".preflight-{token}").touch()
        except OSError as error:
            raise UserError(
                f"--shared {folder}: rank 0 cannot write there ({error.strerror}); give a folder it may write to"
            ) from error
        return folder

    worlds.on_first(write)
    path, seen = folder / f".preflight-{token}", False
    until = time.monotonic() + seconds  # network file systems show a new file late
    while not seen and time.monotonic() < until:
        if folder.is_dir():
            os.scandir(folder).close()  # asks the server again
        seen = path.exists()
        time.sleep(0 if seen else 0.5)
    answers = worlds.gather_objects(seen)
    worlds.on_first(lambda: path.unlink(missing_ok=True))
    blind = [rank for rank, answer in enumerate(answers) if not answer]
    return (
        [
            f"--shared {folder}: {_some(ranks, blind)} does not see what rank 0 writes there; it must be one file system for all nodes"
        ]
        if blind
        else []
    )


def other_data(path: Path, ranks: list[dict[str, Any]]) -> list[str]:
    """One line for ranks that see no dataset at `path`, and one if they see different ones. A collective."""
    manifest = path / "dataset.json" if path.is_dir() else path
    try:
        found = hashlib.sha256(manifest.read_bytes()).hexdigest()
    except OSError as error:
        found = error.strerror or "cannot be read"
    answers = worlds.gather_objects(found)
    lines = []
    for answer in sorted(set(answers)):
        where = _some(ranks, [rank for rank, one in enumerate(answers) if one == answer])
        if len(answer) != 64:
            lines.append(f"--data {path}: {manifest}: {answer} on {where}; mount or copy the dataset there")
    if len({answer for answer in answers if len(answer) == 64}) > 1:
        lines.append(f"--data {path}: {manifest} is not the same on all nodes; copy one dataset to all")
    return lines


def collectives(world: worlds.World, megabytes: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """Time and bandwidth of each collective at each size.

    Args:
        world: this process among the ranks.
        megabytes: of the whole tensor.
        repeats: calls that are averaged, after two that are not.

    Returns:
        Rows with `collective`, `mb`, `ms` and `gb_per_s` (bytes that a rank must send, over the time).

    Raises:
        UserError: a sum over the ranks is wrong.
    """
    rows = []
    for size in megabytes:
        count = max(1, int(size * 2**20 / 4 / world.size)) * world.size
        whole, part = torch.ones(count, device=world.device), torch.ones(count // world.size, device=world.device)
        share = (world.size - 1) / world.size
        steps: dict[str, tuple[float, Callable[[], Any]]] = {
            "all-reduce": (2 * share, partial(_all_reduce, whole)),
            "all-gather": (share, partial(_all_gather, whole, part)),
            "reduce-scatter": (share, partial(_reduce_scatter, whole, part)),
        }
        for name, (sent, step) in steps.items():
            seconds = _seconds(step, world, repeats)
            result = part if name == "reduce-scatter" else whole
            expected = 1 if name == "all-gather" else world.size
            if not bool((result == expected).all()):
                raise UserError(
                    f"{name} of {size:g} MB gives wrong numbers on rank {world.rank}; test this node's links (nccl-tests, dcgmi diag)"
                )
            rows.append(
                {
                    "collective": name,
                    "mb": size,
                    "ms": round(1e3 * seconds, 3),
                    "gb_per_s": round(sent * count * 4 / seconds / 1e9, 3),
                }
            )
    return rows


def _all_reduce(whole: torch.Tensor) -> None:
    dist.all_reduce(whole.fill_(1.0))


def _all_gather(whole: torch.Tensor, part: torch.Tensor) -> None:
    dist.all_gather_into_tensor(whole, part.fill_(1.0))


def _reduce_scatter(whole: torch.Tensor, part: torch.Tensor) -> None:
    dist.reduce_scatter_tensor(part, whole.fill_(1.0))


def _seconds(step: Callable[[], Any], world: worlds.World, repeats: int) -> float:
    """Seconds of one call on the slowest rank; the first two calls do not count."""
    for turn in range(2 + repeats):
        if turn == 2:
            _finish(world)
            worlds.barrier()
            started = time.perf_counter()
        step()
    _finish(world)
    return max(worlds.gather_objects((time.perf_counter() - started) / repeats))


def _finish(world: worlds.World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _some(ranks: list[dict[str, Any]], which: list[int]) -> str:
    hosts = sorted({str(ranks[rank]["host"]) for rank in which})
    return f"rank{'s' if len(which) > 1 else ''} {', '.join(map(str, which[:8]))}{' …' if len(which) > 8 else ''} ({', '.join(hosts[:4])})"


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """`network.facts` as JSON."""
    return found | {name: [asdict(one) for one in found[name]] for name in ("rendezvous", "collectives")}


def preflight(
    *,
    shared: Path,
    data: Path | None,
    megabytes: Sequence[float],
    repeats: int,
    timeout: float,
    planned: float,
    report: Path | None = None,
) -> list[str]:
    """Opens the ranks, checks, measures and prints. Every rank calls it.

    Args:
        shared: folder of the runs.
        data: dataset folder or subset manifest.
        megabytes: sizes of the collectives.
        repeats: measured calls of each.
        timeout: seconds to wait for all ranks.
        planned: GB/s a GPU between nodes that `tools/plan.py` assumes.
        report: JSON file for everything that was found.

    Returns:
        The problems, one line each, the same on every rank.

    Raises:
        UserError: the ranks do not meet, the folder cannot be written, or a collective gives wrong numbers.
    """
    started = time.perf_counter()
    launched = worlds.launch()
    network.check_names()
    try:
        world = worlds.start(timeout)
    except (dist.DistStoreError, dist.DistNetworkError, TimeoutError) as error:
        raise UserError(
            f"rank {launched.rank} on {socket.gethostname()} waited {time.perf_counter() - started:.0f} s for "
            f"{launched.size} ranks to meet at {launched.address}:{launched.port}, which it would reach over "
            f"{network.towards(launched.address, launched.port) or 'no interface'}; open that port between the nodes, "
            f"and name the network card with NCCL_SOCKET_IFNAME / GLOO_SOCKET_IFNAME ({str(error).splitlines()[0]})"
        ) from error
    ranks = worlds.gather_objects(facts())
    met = time.perf_counter() - started
    problems = differences(ranks) + unshared(shared, ranks)
    if data is not None:
        problems += other_data(data, ranks)
    if world.is_first:
        for line in problems:
            print(f"preflight: error: {line}", file=sys.stderr, flush=True)
    rows = collectives(world, megabytes, repeats) if world.size > 1 else []
    hosts = sorted({one["host"] for one in ranks})
    networks = worlds.gather_objects(network.facts(int(os.environ["MASTER_PORT"])))
    if world.is_first:
        where = f"{len(hosts)} host{'s' if len(hosts) > 1 else ''} ({', '.join(hosts[:8])})"
        print(
            f"preflight: {world.size} rank{'s' if world.size > 1 else ''} on {where}, {ranks[0]['device']}, met in {met:.1f} s"
        )
        for line in network.lines(networks):
            print(f"  {line}")
        for line in network.warnings(networks):
            print(f"preflight: warning: {line}", file=sys.stderr, flush=True)
        for row in rows:
            print(
                f"  {row['collective']:<15}{row['mb']:>7g} MB  {row['ms']:>10.3f} ms  {row['gb_per_s']:>8.2f} GB/s a rank"
            )
        fastest = max((row["gb_per_s"] for row in rows), default=0.0)
        if len(hosts) > 1 and fastest < _SLOW * planned:
            print(
                f"  note: tools/plan.py assumes {planned:.0f} GB/s a GPU between nodes; plan with --link {fastest:.1f}"
            )
        if report:
            found = {"ranks": ranks, "networks": [_plain(one) for one in networks], "collectives": rows}
            write_json(report, found | {"problems": problems}, indent=1)
        if not problems:
            same = f"{data} is the same dataset" if data else "no --data was given"
            print(f"preflight: nothing found that would stop a run: one software, {shared} is shared, {same}")
    worlds.barrier()
    worlds.stop()
    return problems
