"""A GPU and its links as the formulas use them: the rates that programs reach, not the peaks of data sheets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lvtrain.errors import UserError
from lvtrain.planning.data_sheets import GPUS, LINKS, NODE_LINKS

Format = Literal["bfloat16", "tf32", "float32"]

# shares of the peaks that one large matmul and a copy reach: assumed (of an H200: 790 of 989 Tflop/s, 4.3 of 4.8 TB/s)
MATMUL_REACHED, COPY_REACHED = 0.80, 0.90
# all-gather of 8 H100: 360 of 450 GB/s (github.com/NVIDIA/nccl-tests/issues/326)
NODE_LINK_REACHED = 0.80
# all-reduce over three nodes with HDR: 85 of 100 GB/s a node (github.com/NVIDIA/nccl-tests/issues/119)
LINK_REACHED = 0.85


@dataclass(frozen=True)
class Device:
    """One kind of GPU in its cluster.

    Attributes:
        name: for tables.
        matmul: flop/s of a large matmul in bfloat16 or float16.
        tf32: likewise in TF32.
        float32: likewise in float32.
        bandwidth: of a copy in its memory, bytes/s.
        memory: bytes.
        link: bytes/s that a GPU sends to other nodes, and receives at the same time.
        node_link: likewise inside a node.
        per_node: GPUs of a node.
        latency: seconds before the first byte of a collective.
        links: the names of both links, for tables.
    """

    name: str
    matmul: float
    tf32: float
    float32: float
    bandwidth: float
    memory: float
    link: float
    node_link: float
    per_node: int = 8
    latency: float = 3e-5
    links: str = ""

    def rate(self, numbers: Format) -> float:
        """flop/s of a large matmul in these numbers."""
        return {"bfloat16": self.matmul, "tf32": self.tf32, "float32": self.float32}[numbers]


def device(gpu: str = "h200", *, link: str = "ib-ndr400", node_link: str | None = None, per_node: int = 8) -> Device:
    """The GPU `gpu` with its links, by name.

    Args:
        gpu: a name of `GPUS`; case, "NVIDIA", "RTX", spaces and hyphens do not matter.
        link: between nodes: a name of `LINKS`, or what was measured, in GB/s a GPU, such as "40".
        node_link: inside a node, a name of `NODE_LINKS`; the GPU's usual one where it is None.
        per_node: GPUs of a node.

    Raises:
        UserError: an unknown name; the line lists the known ones.
    """
    names = {_letters(name): name for name in GPUS}
    if (name := names.get(_letters(gpu))) is None:
        raise _unknown("GPU", gpu, GPUS)
    sheet = GPUS[name]
    node_link = node_link or sheet.node_link
    if node_link not in NODE_LINKS:
        raise _unknown("link inside a node", node_link, NODE_LINKS)
    rate, latency = _between_nodes(link, per_node)
    return Device(
        name,
        matmul=sheet.bfloat16 * MATMUL_REACHED,
        tf32=sheet.tf32 * MATMUL_REACHED,
        float32=sheet.float32 * MATMUL_REACHED,
        bandwidth=sheet.bandwidth * COPY_REACHED,
        memory=sheet.memory,
        link=rate,
        node_link=NODE_LINKS[node_link] * NODE_LINK_REACHED,
        per_node=per_node,
        latency=latency,
        links=f"{node_link}, {link}" + (" GB/s" if link not in LINKS else ""),
    )


def _between_nodes(link: str, per_node: int) -> tuple[float, float]:
    if link in LINKS:
        sheet = LINKS[link]
        return sheet.rate * LINK_REACHED / (per_node if sheet.shared else 1), sheet.latency
    try:
        measured = float(link) * 1e9
    except ValueError:
        measured = 0.0
    if not 0 < measured < float("inf"):
        raise _unknown("link between nodes", link, LINKS, "; or write what tools/preflight.py measured, in GB/s a GPU")
    return measured, 3e-5


def _letters(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


def _unknown(what: str, name: str, known: Iterable[str], also: str = "") -> UserError:
    return UserError(f"unknown {what} {name!r}; known: {', '.join(known)}{also}")


H200 = device("h200")
