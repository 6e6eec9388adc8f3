"""One whole training step: data, choice of classes, forward, classifier, backward, both optimizers.

It gives images/s, MFU and a breakdown of the time. Start it alone or with a launcher
(`torchrun --nproc_per_node 8 tools/benchmark.py step ...`), where only rank 0's figures count.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lvtrain import randomness
from lvtrain.backbones import create_backbone
from lvtrain.classifier import Anchor, ClassifierOutput, Numerics, ShardedClassifier
from lvtrain.classifier.banks import ExpectationBank
from lvtrain.classifier.margins import CosFace
from lvtrain.distributed import world as worlds
from lvtrain.engine.optimizers.adamw import AdamWSection
from tools.benchmarks import backbone as backbone_benchmark
from tools.benchmarks.measure import Clock, describe, machine_rates, median, peak_memory, profile
from tools.benchmarks.waits import host_waits

SMALL: dict[str, Any] = {
    "name": "vit_nano",
    "batch": 8,
    "classes": 1000,
    "steps": 2,
    "precision": "float32",
    "classifier_precision": "float32",
}


def run(
    name: str = "vit_nano",
    batch: int = 32,
    classes: int = 10_000,
    sample_rate: float = 1.0,
    expectations: bool = False,
    as_ranks: int = 1,
    accumulation: int = 1,
    steps: int = 5,
    stage: int = 1,
    precision: str = "bfloat16",
    classifier_precision: str = "half",
    compile: bool = False,
    checkpoint_blocks: str = "none",
    data: Path | None = None,
    peer: Path | None = None,
    profiled: bool = True,
) -> dict[str, Any]:
    """Images per second, MFU, breakdown in ms, peak memory.

    batch: images per rank and micro-batch. stage: ZeRO. expectations: add PCO's second anchor.

    as_ranks: give this GPU the classifier's work of one of this many ranks: a share of the classes, but the embeddings of
    all ranks (random ones). Communication is left out.

    data: a dataset folder to load from; without it, one batch lies on the device.

    peer: recognition/arcface_torch of an insightface checkout; measures its backbone, PartialFC_V2 and AdamW, too.

    On a GPU the update of the class centres runs during the next forward. Its cost is in `forward`, not in `row
    optimizer`.
    """
    world = worlds.start()
    try:
        step = _Step(
            world,
            name=name,
            batch=batch,
            classes=classes,
            sample_rate=sample_rate,
            expectations=expectations,
            as_ranks=as_ranks,
            accumulation=accumulation,
            stage=stage,
            precision=precision,
            classifier_precision=classifier_precision,
            compile=compile,
            checkpoint_blocks=checkpoint_blocks,
            data=data,
        )
        result: dict[str, Any] = {
            "subject": "step",
            "name": name,
            "batch": batch,
            "accumulation": accumulation,
            "ranks": world.size,
            "as_ranks": as_ranks,
            "classes": classes,
            "sample_rate": sample_rate,
            "expectations": expectations,
            "zero_stage": stage,
            "precision": precision,
            "classifier_precision": classifier_precision,
            "compile": compile,
            "checkpoint_blocks": checkpoint_blocks,
            "device": describe(world.device),
            "torch": torch.__version__,
            **machine_rates(world.device, precision),
        }
        variants: dict[str, Any] = {"lvtrain": step}
        result["peak_memory_gb"] = peak_memory(step, world.device)
        if peer:
            variants["arcface_torch"] = _PeerStep(peer, step, classes, sample_rate)
            variants["arcface_torch"](None), variants["arcface_torch"](None)
        clocks: dict[str, list[Clock]] = {variant: [] for variant in variants}
        for _ in range(steps):
            for variant, one in variants.items():
                clock = Clock(world.device)
                clock.mark("start")
                one(clock)
                clocks[variant].append(clock)
        images = batch * accumulation
        # read at the end: reading after every step would let the device wait
        for variant, taken in clocks.items():
            found = [clock.seconds() for clock in taken]
            total = median([sum(parts.values()) for parts in found])
            flops = step.flops * images / total
            figures = {
                "images_per_second_a_rank": round(images / total, 2),
                "backbone_tflops": float(f"{flops / 1e12:.4g}"),
                "mfu": round(flops / 1e12 / result["matmul_tflops"], 4),
                "ms": {part: round(median([parts[part] for parts in found]) * 1e3, 3) for part in found[0]},
            }
            result |= figures if variant == "lvtrain" else {variant: figures}
        if peer:
            theirs = result["arcface_torch"]["images_per_second_a_rank"]
            result["times_arcface_torch"] = round(result["images_per_second_a_rank"] / theirs, 3)
        result["data_wait_share"] = round(result["ms"]["data"] / sum(result["ms"].values()), 4)
        with host_waits(world.device) as waits:
            step(None)
        result["host_waits"] = dict(waits)
        if profiled:
            result["profile"] = profile(lambda: step(None), world.device)
        return result
    finally:
        worlds.stop()


class _Step:
    """A step as in the training loop. The loss stays on the device."""

    def __init__(
        self,
        world: worlds.World,
        *,
        name: str,
        batch: int,
        classes: int,
        sample_rate: float,
        expectations: bool,
        as_ranks: int,
        accumulation: int,
        stage: int,
        precision: str,
        classifier_precision: str,
        compile: bool,
        checkpoint_blocks: str,
        data: Path | None,
    ) -> None:
        from lvtrain.engine.engine import Engine, resolve_ds_config

        device = self.device = world.device
        torch.manual_seed(0)
        module = create_backbone(name, compile=compile, checkpoint_blocks=checkpoint_blocks).to(device)
        self.image_size, self.dim = module.image_size, module.embedding_dim
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            create_backbone(name).to(device).train()(torch.zeros(2, 3, self.image_size, self.image_size, device=device))
        self.flops = 3 * counter.get_total_flops() / 2
        self.name, self.batch, self.accumulation, self.number = name, batch, accumulation, 0
        self.half = precision == "bfloat16"
        self.local_classes = classes // as_ranks
        self.classifier = ShardedClassifier(
            self.local_classes,
            self.dim,
            margin=CosFace(),
            numerics=Numerics(classifier_precision),  # type: ignore[arg-type]
            sample_rate=sample_rate,
            device=device,
        )
        self.bank: ExpectationBank | None = None
        self.anchors: list[Anchor] = []
        if expectations:
            self.bank = ExpectationBank(self.local_classes, self.dim, self.classifier.rows, device=device)
            self.bank.start_from(self.classifier.weight.detach())
            self.anchors = [Anchor(self.bank.rows_tensor, CosFace(), is_unit=True)]
        others = batch * (as_ranks - 1)
        self.others = torch.randn(others, self.dim, device=device)
        self.other_labels = torch.randint(self.local_classes, (others,), device=device)
        self.host_labels = torch.randint(self.local_classes, (batch,))
        optimizer = AdamWSection(precision=precision)  # type: ignore[arg-type]
        config = resolve_ds_config({"zero_optimization": {"stage": stage}}, optimizer=optimizer)
        self.engine = Engine(
            module,
            ds_config=config,
            micro_batch=batch,
            accumulation=accumulation,
            optimizer=optimizer,
            device=device,
        )
        self.loader = self._loaded(data, world) if data else None
        self.images = torch.randn(batch, 3, self.image_size, self.image_size, device=device)
        self.labels = self.host_labels.to(device)
        # labels of the whole global batch on the host, which the classifier gets before a step
        self.global_labels = torch.cat([self.host_labels, self.other_labels.cpu()])

    def _loaded(self, data: Path, world: worlds.World) -> Any:
        from lvtrain.data import Loader, ShardDataset

        self.global_batch = self.batch * self.accumulation * world.size
        return Loader(
            ShardDataset(data),
            seed=0,
            micro_batch=self.batch,
            micro_batches=self.accumulation * world.size,
            rank=world.rank,
            size=world.size,
            device=self.device,
            image_size=self.image_size,
        )

    def __call__(self, clock: Clock | None) -> None:
        mark = clock.mark if clock else (lambda name: None)
        labels_of_step = self.global_labels
        if self.loader:
            labels = torch.from_numpy(self.loader.global_labels(self.number * self.global_batch, self.global_batch))
            labels_of_step = torch.cat([labels % self.local_classes, labels_of_step[self.batch :]])
        self.classifier.begin_step(self.number, labels_of_step)
        mark("choose classes")
        seen: list[ClassifierOutput] = []
        for micro in range(self.accumulation):
            images, labels = self.images, self.labels
            if self.loader:
                batch = next(self.loader)
                images, labels = batch.images, batch.labels % self.local_classes
            mark("data")
            torch.manual_seed(randomness.torch_seed(0, "model", self.number, micro))
            embeddings = self.engine(images)
            mark("forward")
            gathered = torch.cat([embeddings, self.others]) if len(self.others) else embeddings
            gathered_labels = torch.cat([labels, self.other_labels]) if len(self.others) else labels
            output = self.classifier(gathered, gathered_labels, step=self.number, anchors=self.anchors)
            seen.append(output)
            loss = output.loss
            mark("classifier")
            self.engine.backward(loss)
            mark("backward")
        self.engine.step(1e-4, loss.detach())
        self.engine.sync_batch_statistics()
        mark("backbone optimizer")
        self.classifier.end_step(lr=1e-4)
        if self.bank is not None:
            self.bank.update(torch.cat([one.embeddings for one in seen]), torch.cat([one.labels for one in seen]))
        mark("row optimizer")
        self.number += 1


class _PeerStep:
    """arcface_torch's step: its backbone with our weights, PartialFC_V2 as in train_v2.py (float32), AdamW, clipping, loss.item()."""

    def __init__(self, path: Path, ours: _Step, classes: int, sample_rate: float) -> None:
        device = self.device = ours.device
        like = create_backbone(ours.name)
        self.module: nn.Module = backbone_benchmark._peer(path, ours.name, like).to(device).train()
        sys.path.insert(0, str(path))
        try:
            from losses import CombinedMarginLoss  # type: ignore[import-not-found]
            from partial_fc_v2 import PartialFC_V2  # type: ignore[import-not-found]
        finally:
            sys.path.remove(str(path))
        if device.type == "cpu":  # it calls .cuda() on everything
            torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
        self.head = PartialFC_V2(CombinedMarginLoss(64, 1.0, 0.0, 0.4), ours.dim, classes, sample_rate, False)
        self.head = self.head.train().to(device)
        parameters = [{"params": self.module.parameters()}, {"params": self.head.parameters()}]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1)
        self.images, self.labels = ours.images, ours.labels
        self.half = ours.half and self.device.type == "cpu"  # on a GPU it switches its own float16 autocast on

    def __call__(self, clock: Clock | None) -> None:
        mark = clock.mark if clock else (lambda name: None)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            embeddings = self.module(self.images)
        mark("forward")
        loss = self.head(embeddings.float(), self.labels.clone())
        mark("classifier")
        loss.backward()
        mark("backward")
        nn.utils.clip_grad_norm_(self.module.parameters(), 5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")
        loss.item()
