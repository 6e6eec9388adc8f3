"""One step of one phase on so many GPUs: does it fit, how long does it take, what travels."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lvtrain.errors import UserError
from lvtrain.planning import memory, timing, wire
from lvtrain.planning.device import H200, Device
from lvtrain.planning.memory import ClassRows, Teacher
from lvtrain.planning.network import Network
from lvtrain.planning.wire import Transfer


@dataclass(frozen=True)
class Plan:
    """memory: bytes a rank by part; seconds: of one step by part, exposed communication included; transfers: bytes a
    step and rank.
    """

    network: Network
    device: Device
    ranks: int
    stage: int
    micro_batch: int
    accumulation: int
    memory: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    transfers: tuple[Transfer, ...] = ()

    @property
    def total_memory(self) -> float:
        """Bytes a rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_memory <= self.device.memory

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Of one GPU."""
        return self.micro_batch * self.accumulation / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model flops (three forwards, nothing recomputed, the backbone alone) against the matmul rate."""
        return 3 * self.network.forward_flops * self.images_per_second / self.device.matmul

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = {
            name: getattr(self, name) for name in ("total_memory", "fits", "step_seconds", "images_per_second", "mfu")
        }
        return {**asdict(self), **totals}

    def table(self) -> str:
        """Three short tables as text: memory, time, wire."""
        network = self.network
        size, work = network.parameters / 1e6, network.forward_flops / 2e9
        head = (
            f"{network.name} ({size:.1f} M parameters, {work:.2f} GMAC an image) on {self.ranks} x {self.device.name},"
            f" ZeRO-{self.stage}, {self.micro_batch} images a micro-batch x {self.accumulation}"
        )
        lines = [head, "", "memory a rank, GB"]
        lines += [f"  {name:<42}{size / 1e9:9.2f}" for name, size in self.memory.items()]
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines += [
            f"  {'total':<42}{self.total_memory / 1e9:9.2f}   {verdict} in {self.device.memory / 1e9:.0f}",
            "",
            f"time a step on {self.device.name}, ms (from formulas, not measured on this machine)",
        ]
        lines += [f"  {name:<42}{seconds * 1e3:9.2f}" for name, seconds in self.seconds.items()]
        lines.append(
            f"  {'total':<42}{self.step_seconds * 1e3:9.2f}   {self.images_per_second:,.0f} images/s per {self.device.name}, "
            f"{self.images_per_second * self.ranks:,.0f} in all, MFU {self.mfu:.0%}"
        )
        if self.transfers:
            lines += ["", f"{'sent a step and rank, MB':<44}{'all':>9}{'to other nodes':>16}   hides behind"]
            lines += [
                f"  {t.name:<42}{t.sent / 1e6:9.1f}{t.between / 1e6:16.1f}   {t.behind or 'nothing: waited for'}"
                for t in self.transfers
            ]
        return "\n".join(lines)


def plan(
    network: Network,
    *,
    ranks: int,
    micro_batch: int,
    accumulation: int = 1,
    stage: int = 1,
    rows: ClassRows | None = None,
    device: Device = H200,
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    gradient_bytes: int = 4,
    hierarchical: bool = False,
    overlap: bool | None = None,
    compiled: bool = False,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    bucket: int = memory.DEEPSPEED_BUCKET,
    ema: bool = False,
    views: float = 1.0,
    teacher_views: float = 0.0,
    pictures: float = 1.0,
    teacher: Teacher | None = None,
    extra: dict[str, float] | None = None,
) -> Plan:
    """The plan of one step. Pure: nothing is built, allocated or asked of the machine.

    network: from `measure_network`, or by hand. micro_batch: images a rank and forward; accumulation: forwards a step.
    rows: the sharded classifier, None without one. gradient_bytes: 4, or 2 with bfloat16 gradient communication.
    overlap: DeepSpeed's `overlap_comm`, see `wire.backbone_transfers`. bucket: its `reduce_bucket_size`, elements.
    ema: an average of the weights is kept on the device.
    views, teacher_views: self-distillation's views of one image in full pictures, with and without a backward pass;
    pictures: what the loader brings of one image, in full pictures.
    teacher: a frozen network that sees the same pictures, whole on every rank. extra: further bytes by name.
    Raises UserError for counts that are not positive or an unknown stage.
    """
    if min(ranks, micro_batch, accumulation) < 1:
        raise UserError(
            f"plan: ranks {ranks}, micro_batch {micro_batch} and accumulation {accumulation} must be positive"
        )
    if stage not in (0, 1, 2, 3):
        raise UserError(f"plan: ZeRO stage {stage} must be 0, 1, 2 or 3")
    parts = memory.state_bytes(
        network,
        ranks=ranks,
        stage=stage,
        precision=precision,
        bucket=bucket,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
    )
    if ema:
        parts["average of the weights"] = 4.0 * network.parameters
    parts |= memory.activation_bytes(network, micro_batch, views=views, pictures=pictures, precision=precision)
    if teacher is not None:
        parts |= memory.teacher_bytes(teacher, micro_batch, precision=precision)
    parts |= extra or {}
    seconds = timing.compute_seconds(
        network,
        device,
        micro_batch=micro_batch,
        accumulation=accumulation,
        ranks=ranks,
        stage=stage,
        compiled=compiled,
        views=views,
        teacher_views=teacher_views,
    )
    if teacher is not None:
        seconds["teacher"] = micro_batch * accumulation * timing.forward_seconds(teacher.network, device)
    transfers = []
    if rows is not None:
        parts |= memory.classifier_bytes(rows, ranks=ranks, micro_batch=micro_batch)
        seconds |= timing.classifier_seconds(
            rows, device, micro_batch=micro_batch, accumulation=accumulation, ranks=ranks
        )
        transfers += wire.classifier_transfers(
            rows, ranks=ranks, micro_batch=micro_batch, accumulation=accumulation, device=device
        )
    parts["allowance (context, workspaces)"] = memory.ALLOWANCE
    transfers += wire.backbone_transfers(
        network,
        stage=stage,
        ranks=ranks,
        accumulation=accumulation,
        device=device,
        gradient_bytes=gradient_bytes,
        hierarchical=hierarchical,
        overlap=overlap,
    )
    seconds["communication waited for"] = _exposed(transfers, seconds, device)
    return Plan(network, device, ranks, stage, micro_batch, accumulation, parts, seconds, tuple(transfers))


def _exposed(transfers: list[Transfer], seconds: dict[str, float], device: Device) -> float:
    """Transfers that hide behind nothing, and what does not fit behind the computation the others hide behind."""
    room = {
        "forward": seconds["forward"],
        "backward": seconds["backward"],
        "the class rows' gradient": seconds.get("classifier", 0.0) / 4,
    }
    waited = sum(t.seconds(device) for t in transfers if not t.behind)
    for behind, available in room.items():
        waited += max(0.0, sum(t.seconds(device) for t in transfers if t.behind == behind) - available)
    return waited
