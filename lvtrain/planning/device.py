"""What the formulas need to know of an accelerator and its links."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """matmul: bfloat16 flop/s a large matmul reaches (measured, not the brochure's); bandwidth: copy, bytes/s;
    memory: bytes.

    link: bytes/s a GPU sends and receives to other nodes at once; node_link: likewise within a node of `per_node`
    GPUs. latency: seconds before a collective's first byte.
    """

    name: str
    matmul: float
    bandwidth: float
    memory: float
    link: float = 50e9
    node_link: float = 400e9
    per_node: int = 8
    latency: float = 3e-5


# matmul and copy as measured on one; links as data sheets and usual clusters have them (400 Gbit/s a GPU, NVLink 4)
H200 = Device("H200", matmul=790e12, bandwidth=4.3e12, memory=149e9)
