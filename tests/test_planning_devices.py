"""GPUs and links by name, against figures that their makers derive: clocks times units, pins times rates."""

from __future__ import annotations

import pytest

from lvtrain.errors import UserError
from lvtrain.planning.data_sheets import GPUS, LINKS, NODE_LINKS
from lvtrain.planning.device import COPY_REACHED, LINK_REACHED, MATMUL_REACHED, NODE_LINK_REACHED, device

# name: (SMs, boost clock in GHz, bfloat16 multiply-adds of an SM and clock, float32 ones, bits of memory bus, Gbit/s a pin);
# from the architecture whitepapers (A100, H100, Ada). H200 is an H100 with other memory.
CHIPS = {
    "a100-40": (108, 1.410, 1024, 64, 5120, 2.43),
    "a100-80": (108, 1.410, 1024, 64, 5120, 3.19),
    "h100": (132, 1.830, 2048, 128, 5120, 5.23),
    "h200": (132, 1.830, 2048, 128, 6144, 6.25),
    "l40s": (142, 2.520, 512, 128, 384, 18.0),
    "rtx4090": (128, 2.520, 256, 128, 384, 21.0),
}


@pytest.mark.parametrize("name", CHIPS)
def test_data_sheets_are_units_times_clocks(name: str) -> None:
    sms, clock, tensor, cores, bits, pin = CHIPS[name]
    sheet = GPUS[name]
    assert sheet.bfloat16 == pytest.approx(2 * sms * clock * 1e9 * tensor, rel=0.02)
    assert sheet.float32 == pytest.approx(2 * sms * clock * 1e9 * cores, rel=0.09)  # H100: at 1.98 GHz
    assert sheet.bandwidth == pytest.approx(bits * pin * 1e9 / 8, rel=0.01)
    assert sheet.tf32 == pytest.approx(sheet.bfloat16 / 2, rel=0.02)  # half as many multiply-adds, on all of them


def test_links_are_lanes_times_rates() -> None:
    # NVLink 3, 4: 25 GB/s each way a link, 12 and 18 of them; NVLink 5: 50 GB/s, 18. PCIe: 16 lanes, 128b/130b
    assert {name: NODE_LINKS[name] for name in ("nvlink3", "nvlink4", "nvlink5")} == {
        "nvlink3": 12 * 25e9,
        "nvlink4": 18 * 25e9,
        "nvlink5": 18 * 50e9,
    }
    for generation, transfers in (("pcie3", 8e9), ("pcie4", 16e9), ("pcie5", 32e9)):
        assert NODE_LINKS[generation] == pytest.approx(16 * transfers * 128 / 130 / 8, rel=1e-3)
    for name, sheet in LINKS.items():
        assert sheet.rate == int("".join(filter(str.isdigit, name.split("-")[1]))) * 1e9 / 8
    assert {sheet.node_link for sheet in GPUS.values()} <= NODE_LINKS.keys()


def test_a_device_by_name() -> None:
    h200 = device()
    # what is assumed of one: 790 Tflop/s, 4.3 TB/s
    assert (h200.matmul, h200.bandwidth) == pytest.approx((790e12, 4.3e12), rel=0.01)
    assert h200.memory == 141e9 and h200.link == 50e9 * LINK_REACHED and h200.node_link == 450e9 * NODE_LINK_REACHED
    small = device("NVIDIA RTX 4090", link="eth-25", per_node=4)
    assert small.name == "rtx4090" and small.memory == 24e9 and small.link == 25e9 / 8 / 4 * LINK_REACHED
    assert (small.matmul, small.bandwidth) == (165.2e12 * MATMUL_REACHED, 1.008e12 * COPY_REACHED)
    assert device("A100-80", link="37.5", node_link="pcie4").link == 37.5e9  # measured: taken as it is
    for arguments, listed in (
        ({"gpu": "A100"}, "a100-40, a100-80, h100"),
        ({"link": "ib"}, "ib-ndr400"),
        ({"link": "-3"}, "ib-ndr400"),
        ({"node_link": "nvlink"}, "nvlink3, nvlink4"),
    ):
        with pytest.raises(UserError, match=listed):
            device(**arguments)
