"""GPUs and links by name: what their makers publish. `lvtrain.planning.device` makes a `Device` of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSheet:
    """The data sheet of one kind of GPU.

    Attributes:
        memory: bytes; the sheet's GB are 10^9 bytes here, which is a little less than the driver reports.
        bfloat16: flop/s of the tensor cores, dense, with float32 sums.
        tf32: likewise.
        float32: flop/s without tensor cores.
        bandwidth: of its memory, bytes/s.
        node_link: its usual link inside a node, a name of `NODE_LINKS`.
        source: where the figures are published.
    """

    memory: float
    bfloat16: float
    tf32: float
    float32: float
    bandwidth: float
    node_link: str
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU data sheet, SXM4"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet, SXM5; dense is half of the sheet's sparse figures"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet, SXM5; dense is half of the sheet's sparse figures"
_B200 = "NVIDIA Blackwell architecture technical brief, HGX B200 (1,000 W); memory: DGX B200 data sheet (1,440 GB of 8)"
_L40S = "NVIDIA L40S data sheet"
_4090 = "NVIDIA Ada GPU architecture whitepaper, appendix A (tensor cores with FP32 accumulate)"

GPUS = {
    "a100-40": GpuSheet(40e9, 312e12, 156e12, 19.5e12, 1.555e12, "nvlink3", _A100),
    "a100-80": GpuSheet(80e9, 312e12, 156e12, 19.5e12, 2.039e12, "nvlink3", _A100),
    "h100": GpuSheet(80e9, 989.5e12, 494.5e12, 67e12, 3.35e12, "nvlink4", _H100),
    "h200": GpuSheet(141e9, 989.5e12, 494.5e12, 67e12, 4.8e12, "nvlink4", _H200),
    "b200": GpuSheet(180e9, 2250e12, 1100e12, 80e12, 8e12, "nvlink5", _B200),
    "l40s": GpuSheet(48e9, 362.05e12, 183e12, 91.6e12, 0.864e12, "pcie4", _L40S),
    "rtx4090": GpuSheet(24e9, 165.2e12, 82.6e12, 82.6e12, 1.008e12, "pcie4", _4090),
}

# bytes/s that a GPU sends inside its node, and receives at the same time: half of the "total bandwidth" of a data sheet
NODE_LINKS = {
    "nvlink3": 300e9,  # A100 data sheet: 600 GB/s both ways
    "nvlink4": 450e9,  # H100 and H200 data sheets: 900 GB/s both ways
    "nvlink5": 900e9,  # DGX B200 data sheet: 14.4 TB/s of 8 GPUs both ways
    "pcie3": 15.75e9,  # PCI Express base specification 3.0: 8 GT/s, 16 lanes, 128b/130b
    "pcie4": 31.5e9,  # 4.0: 16 GT/s
    "pcie5": 63e9,  # 5.0: 32 GT/s
}


@dataclass(frozen=True)
class LinkSheet:
    """A network between nodes.

    Attributes:
        rate: bytes/s of one card, each way.
        shared: whether one card serves the whole node, as Ethernet usually does; else every GPU has a card.
        latency: seconds before the first byte of a collective; a usual figure, not one of a data sheet.
    """

    rate: float
    shared: bool = False
    latency: float = 3e-5


# the name has the rate in Gbit/s; InfiniBand trade association roadmap (4 lanes), IEEE 802.3
LINKS = {
    "ib-hdr100": LinkSheet(12.5e9),
    "ib-hdr200": LinkSheet(25e9),
    "ib-ndr200": LinkSheet(25e9),
    "ib-ndr400": LinkSheet(50e9),
    "ib-xdr800": LinkSheet(100e9),
    "roce-100": LinkSheet(12.5e9),
    "roce-200": LinkSheet(25e9),
    "roce-400": LinkSheet(50e9),
    "eth-10": LinkSheet(1.25e9, shared=True, latency=2e-4),
    "eth-25": LinkSheet(3.125e9, shared=True, latency=2e-4),
    "eth-100": LinkSheet(12.5e9, shared=True, latency=2e-4),
}
