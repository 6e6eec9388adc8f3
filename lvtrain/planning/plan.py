"""One step on so many GPUs: does it fit, how long does it take, what is sent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lvtrain.errors import UserError
from lvtrain.planning import memory, timing, wire
from lvtrain.planning.device import Device
from lvtrain.planning.setup import Setup
from lvtrain.planning.wire import Transfer


@dataclass(frozen=True)
class Plan:
    """The result of a plan for one phase.

    Attributes:
        setup: what was planned.
        memory: bytes per rank, by part.
        seconds: of one step, by part, with the communication that is waited for.
        transfers: bytes per step and rank.
    """

    setup: Setup
    memory: dict[str, float]
    seconds: dict[str, float]
    transfers: tuple[Transfer, ...]

    @property
    def total_memory(self) -> float:
        """Bytes per rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= self.setup.device.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Of one GPU."""
        return self.setup.micro_batch * self.setup.accumulation / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model flops (three forwards, nothing recomputed, the backbone alone) against the matmul rate."""
        return 3 * self.setup.network.forward_flops * self.images_per_second / self.setup.device.matmul

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = {
            name: getattr(self, name) for name in ("total_memory", "fits", "step_seconds", "images_per_second", "mfu")
        }
        return {**asdict(self), **totals}

    def table(self) -> str:
        """Three short tables as text: memory, time, communication."""
        setup, network, device = self.setup, self.setup.network, self.setup.device
        size, work = network.parameters / 1e6, network.forward_flops / 2e9
        head = (
            f"{network.name} ({size:.1f} M parameters, {work:.2f} GMAC an image) on {setup.ranks} x {device.name},"
            f" ZeRO-{setup.zero.stage}, {setup.micro_batch} images a micro-batch x {setup.accumulation}"
        )
        lines = [head, "", "memory a rank, GB"]
        lines += [f"  {name:<42}{size / 1e9:9.2f}" for name, size in self.memory.items()]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines += [
            f"  {'total':<42}{self.total_memory / 1e9:9.2f}   {verdict} in {device.memory / 1e9:.0f}",
            "",
            f"time a step on {device.name}, ms (from formulas, not measured on this machine)",
        ]
        lines += [f"  {name:<42}{seconds * 1e3:9.2f}" for name, seconds in self.seconds.items()]
        lines.append(
            f"  {'total':<42}{self.step_seconds * 1e3:9.2f}   {self.images_per_second:,.0f} images/s per {device.name}, "
            f"{self.images_per_second * setup.ranks:,.0f} in all, MFU {self.mfu:.0%}"
        )
        if self.transfers:
            lines += ["", f"{'sent a step and rank, MB':<44}{'all':>9}{'to other nodes':>16}   hides behind"]
            lines += [
                f"  {t.name:<42}{t.sent / 1e6:9.1f}{t.between / 1e6:16.1f}   {t.behind or 'nothing: waited for'}"
                for t in self.transfers
            ]
        return "\n".join(lines)


def plan(setup: Setup) -> Plan:
    """The plan of one step. Pure: nothing is built or allocated, and no GPU is asked.

    Raises:
        UserError: counts that are not positive, or an unknown ZeRO stage.
    """
    if min(setup.ranks, setup.micro_batch, setup.accumulation) < 1:
        raise UserError(
            f"plan: ranks {setup.ranks}, micro_batch {setup.micro_batch} and accumulation {setup.accumulation} "
            "must be positive"
        )
    if setup.zero.stage not in (0, 1, 2, 3):
        raise UserError(f"plan: ZeRO stage {setup.zero.stage} must be 0, 1, 2 or 3")
    seconds = timing.compute_seconds(setup)
    transfers = wire.transfers(setup)
    seconds["communication waited for"] = _waited(transfers, seconds, setup.device)
    return Plan(setup, memory.bytes_by_part(setup), seconds, tuple(transfers))


def _waited(transfers: list[Transfer], seconds: dict[str, float], device: Device) -> float:
    """Seconds of transfers that the step waits for: all of some, of others what exceeds the computation at that time."""
    room = {
        "forward": seconds["forward"],
        "backward": seconds["backward"],
        "the class centres' gradient": seconds.get("classifier", 0.0) / 4,
    }
    waited = sum(t.seconds(device) for t in transfers if not t.behind)
    for behind, available in room.items():
        waited += max(0.0, sum(t.seconds(device) for t in transfers if t.behind == behind) - available)
    return waited
