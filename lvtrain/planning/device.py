"""The figures of a GPU and its links that the formulas use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of GPU.

    Attributes:
        name: for tables.
        matmul: bfloat16 flop/s of a large matmul, measured.
        bandwidth: of a copy in its memory, bytes/s.
        memory: bytes.
        link: bytes/s that a GPU sends to other nodes, and receives at the same time.
        node_link: likewise inside a node.
        per_node: GPUs of a node.
        latency: seconds before the first byte of a collective.
    """

    name: str
    matmul: float
    bandwidth: float
    memory: float
    link: float = 50e9
    node_link: float = 400e9
    per_node: int = 8
    latency: float = 3e-5


# matmul and copy are measured; links are those of data sheets and usual clusters (400 Gbit/s a GPU, NVLink 4)
H200 = Device("H200", matmul=790e12, bandwidth=4.3e12, memory=149e9)
