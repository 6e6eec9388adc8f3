"""The planner's formulas against figures worked out by hand, and published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import pytest
from torch import nn

from lvtrain.backbones import create_backbone
from lvtrain.errors import UserError
from lvtrain.planning import (
    ClassCentres,
    FrozenNetwork,
    Network,
    Setup,
    Zero,
    device,
    measure_network,
    plan,
)
from lvtrain.planning.memory import moments, state_bytes
from lvtrain.planning.network import forward_peak
from lvtrain.planning.wire import backbone_transfers, classifier_transfers
from lvtrain.planning.wire import transfers as transfers_of

TOY = Network("toy", 1_000_000, 400_000, forward_flops=2e9, train_flops=6e9, saved=1e6, unrecomputed=1e6)


@cache
def network(name: str, **overrides: object) -> Network:
    return measure_network(name, lambda: create_backbone(name, **overrides))


def test_work_is_insightfaces_published_figures() -> None:
    # arcface_torch's README, GFLOPs (multiply-adds): ViT-T 1.5, ViT-S 5.7, ResNet-50 6.3, ResNet-100 12.1
    for name, published in (("vit_t", 1.5), ("vit_s", 5.7), ("iresnet50", 6.3), ("iresnet100", 12.1)):
        assert network(name).forward_flops / 2e9 == pytest.approx(published, abs=0.06), name
    # the text of LAFS: 2.48 G for Part fViT-Tiny, attention's own products not counted
    part = network("part_fvit_tiny", embedding_dim=256)
    attention = 12 * 2 * 197**2 * 512
    assert (part.forward_flops / 2 - attention) / 1e9 == pytest.approx(2.48, rel=0.03)


def test_dropped_tokens_cost_nothing() -> None:
    whole, part = network("vit_t", depth=2), network("vit_t", depth=2, mask_ratio=0.1)
    head = 144 * 256 * 256 + 256 * 512
    patches = 144 * 3 * 81 * 256
    blocks = whole.forward_flops / 2 - head - patches
    assert part.forward_flops / 2 - head - patches == pytest.approx(blocks * 128 / 144, rel=0.01)
    assert part.saved < whole.saved * 0.95


def test_recomputation_is_counted() -> None:
    whole, block = network("vit_t", depth=4), network("vit_t", depth=4, checkpoint_blocks="block")
    activation = network("vit_t", depth=4, checkpoint_blocks="activation")
    assert block.unrecomputed == activation.unrecomputed == pytest.approx(whole.saved, rel=1e-3)
    assert block.saved + block.recomputed < activation.saved < whole.saved
    assert activation.train_flops == whole.train_flops < block.train_flops  # no matmul is done twice


def test_states_by_hand() -> None:
    # 1 M parameters, 4 ranks: weights 4 MB, own share of weights and two moments 12 / 4
    def states(stage: int) -> dict[str, float]:
        return {name: size / 1e6 for name, size in state_bytes(TOY, ranks=4, zero=Zero(stage)).items()}

    assert states(0) == {"weights": 4, "optimizer": 8}
    assert states(1) == states(2) == {"weights": 4, "optimizer": 3}
    # stage 3: the share, the largest module gathered, what is prefetched (here all of it)
    assert states(3)["weights"] == pytest.approx(1 + 1.6 + 4)
    assert state_bytes(TOY, ranks=4, zero=Zero(3, offload_optimizer=True))["optimizer"] == 0


def test_moments_by_hand() -> None:
    """1 M parameters of which the largest has 0.4 M; 4 MB of gradients and 2 MB of autocast copies."""

    def added(moment: str, stage: int, accumulation: int = 1, **settings: Any) -> dict[str, float]:
        setup = Setup(TOY, ranks=4, micro_batch=2, accumulation=accumulation, zero=Zero(stage, **settings))
        return {name: size / 1e6 for name, size in moments(setup)[moment].items()}

    assert added("backward ends", 1, bucket=1000) == {
        "gradients": 4,
        "bfloat16 weight copies": 2,
        "reduction buckets": 1.6,  # the largest parameter has a bucket of its own
    }
    assert added("backward ends", 2, bucket=1000)["reduction buckets"] == 4
    assert added("backward ends", 2)["gradients"] == added("backward ends", 3)["gradients"] == 1
    assert added("backward ends", 1)["reduction buckets"] == 4  # no larger than all parameters
    assert added("backward ends", 0)["reduction buckets"] == 4  # a copy of all gradients
    assert "gradients" not in added("loss", 1)
    assert (added("loss", 1, 2)["gradients"], added("loss", 2, 2)["gradients"]) == (4, 1)  # of the micro-batch before
    # nothing is summed on one rank
    assert "reduction buckets" not in moments(Setup(TOY, ranks=1, micro_batch=2))["backward ends"]


def test_wire_by_hand() -> None:
    classes = ClassCentres(1_000_000)
    setup = Setup(TOY, ranks=64, micro_batch=384)
    transfers = {t.name: t for t in classifier_transfers(setup, classes)}
    embeddings = transfers["embeddings, all-gather"]
    assert embeddings.sent == 24576 * 512 * 4 * 63 / 64  # every rank's rows but the own, float32
    assert embeddings.between == 24576 * 512 * 4 * 7 / 8 / 8  # 7 of 8 nodes' rows, fetched once by the 8 of a node

    def sent(stage: int, accumulation: int = 1) -> float:
        found = backbone_transfers(replace(setup, zero=Zero(stage), accumulation=accumulation))
        return sum(t.sent for t in found) / (4e6 * 63 / 64)

    # in units of one float32 copy of the network; an all-reduce is two
    assert (sent(0), sent(1), sent(2), sent(3)) == (2, 3, 3, 3)
    assert (sent(1, 4), sent(2, 4), sent(3, 4)) == (3, 9, 12)  # stage 1 sums once a step

    def behind(**settings: Any) -> str:
        return backbone_transfers(replace(setup, zero=Zero(**settings)))[0].behind

    assert behind(stage=1) == behind(stage=2) == "backward"
    compiled = replace(setup, zero=Zero(1), compiled=True)
    assert backbone_transfers(compiled)[0].behind == "backward"  # block by block
    whole = replace(compiled, network=replace(setup.network, compiles_whole=True))
    assert backbone_transfers(whole)[0].behind == ""  # all gradients come at the end
    assert network("timm:resnet18").compiles_whole and not network("vit_t", depth=2).compiles_whole
    assert behind(stage=0) == behind(stage=1, overlap=False) == behind(stage=2, offload_optimizer=True) == ""
    assert transfers_of(Setup(TOY, ranks=1, micro_batch=8, classes=classes, zero=Zero(3))) == []


@pytest.mark.parametrize(("ranks", "link"), [(8, "ib-ndr400"), (64, "ib-ndr400"), (64, "roce-100"), (64, "25")])
def test_what_the_step_waits_for_by_hand(ranks: int, link: str) -> None:
    """The gradients of 256 M parameters, in one node and over 400, 100 and 200 Gb/s a GPU."""
    big, gpu = replace(TOY, parameters=256_000_000), device("h200", link=link)
    rate = {"ib-ndr400": 0.85 * 50e9, "roce-100": 0.85 * 12.5e9, "25": 25e9}[link]
    leaves = 0 if ranks == 8 else 2 * 1.024e9 * 7 / 8 / 8  # float32, there and back, 7 of 8 nodes, shared by 8 GPUs
    summed = 3e-5 + max(leaves / rate, 2 * 1.024e9 * (ranks - 1) / ranks / (0.8 * 450e9))
    weights = 3e-5 + (summed - 3e-5) / 2
    early, late = (
        plan(Setup(big, ranks=ranks, micro_batch=384, zero=Zero(1, overlap=overlap), device=gpu)).seconds
        for overlap in (None, False)
    )
    assert late["communication waited for"] == pytest.approx(summed + weights)
    hidden = min(summed, early["backward"])
    assert early["communication waited for"] == pytest.approx(summed + weights - hidden)


def test_the_price_of_all_classes() -> None:
    """Published by insightface for 2 M identities: all classes keep 56% of a tenth's images/s.

    Ours must plan to keep 85% with ViT-L between PyTorch's operations, and 94% with the fused kernels.
    """

    def rate(sample_rate: float, kernel: Literal["torch", "triton"]) -> float:
        classes = ClassCentres(2_059_906, sample_rate=sample_rate, kernel=kernel, keep_mb=2048)
        return plan(Setup(network("vit_l"), ranks=64, micro_batch=384, classes=classes)).images_per_second

    assert rate(1.0, "torch") > 0.85 * rate(0.1, "torch")
    assert rate(1.0, "triton") > 0.94 * rate(0.1, "triton")


def test_exponentials_that_wait_for_backward_save_a_matmul() -> None:
    """Within the gradient's memory all of them at B = 2 d in 16 bits, and the rest in memory of their own."""
    assert ClassCentres(8000).kept_share(1024, 8) == ClassCentres(8000, precision="float32").kept_share(512, 8) == 1.0
    assert ClassCentres(8000).kept_share(4096, 8) == 0.25
    assert ClassCentres(8000, keep_mb=4096 * 500 * 2 / 2**20).kept_share(4096, 8) == 0.75
    few, all_kept = (
        plan(Setup(TOY, ranks=8, micro_batch=512, classes=ClassCentres(100_000, keep_mb=mb))).seconds["classifier"]
        for mb in (0.0, 1000.0)
    )
    assert 0.7 < all_kept / few < 0.8


def test_plan_hangs_together() -> None:
    setup = Setup(TOY, ranks=8, micro_batch=32, classes=ClassCentres(100_000, banks=("expectations",)))
    one = plan(setup)
    assert one.total_memory == sum(one.memory.values()) and one.step_seconds == sum(one.seconds.values())
    assert one.images_per_second == pytest.approx(32 / one.step_seconds)
    assert one.fits and not plan(replace(setup, micro_batch=200_000)).fits
    assert plan(replace(setup, compiled=True)).seconds["backward"] < one.seconds["backward"]
    full = plan(replace(setup, precision="float32"))  # H200: 989.5 Tflop/s in bfloat16, 67 in float32, 4.8 TB/s
    flops, moved = 32 * 2e9 / 0.75, 32 * 6.2 * 1e6 / 3
    assert one.seconds["forward"] == pytest.approx(flops / (0.8 * 989.5e12) + moved / (0.9 * 4.8e12))
    assert full.seconds["forward"] == pytest.approx(flops / (0.8 * 67e12) + 1.8 * moved / (0.9 * 4.8e12))
    twice = plan(replace(setup, accumulation=2))
    assert twice.seconds["forward"] == 2 * one.seconds["forward"]
    assert twice.memory == one.memory | {"gradients": 4e6}  # of the micro-batch before
    sparse = plan(replace(setup, classes=ClassCentres(100_000, sample_rate=0.1, mode="row_sparse")))
    optimizer = "class centres' optimizer"
    assert sparse.seconds[optimizer] == pytest.approx(one.seconds[optimizer] / 10)
    json.dumps(one.as_dict())
    assert (
        "time a step on h200, ms (from formulas, not measured on this machine)" in one.table()
        and " images/s per h200, " in one.table()
    )
    assert "fits in 141" in one.table() and "embeddings, all-gather" in one.table()
    with pytest.raises(UserError, match="must be positive"):
        plan(replace(setup, ranks=0))
    with pytest.raises(UserError, match="stage 4"):
        plan(replace(setup, zero=Zero(4)))


def test_a_teacher_is_planned() -> None:
    """A forward pass holds a layer's input and output at once, whatever the depth; weights, peak and time come to the student's."""
    pixels = 3 * 112**2
    flat = forward_peak(lambda: nn.Sequential(nn.Flatten(), nn.Linear(pixels, 1000), nn.ReLU(), nn.Linear(1000, 10)))
    assert flat == 2 * pixels + 2 * 1000  # the picture in bfloat16, and the first layer's result
    deep = forward_peak(lambda: nn.Sequential(*(nn.Conv2d(width, 8, 3, padding=1) for width in (3, 8, 8, 8))))
    assert deep == 2 * 2 * 8 * 112**2
    assert forward_peak(lambda: create_backbone("vit_nano", depth=2)) == forward_peak(
        lambda: create_backbone("vit_nano")
    )

    setup = Setup(TOY, ranks=8, micro_batch=32, accumulation=2)
    for precision, factor, copy in (("bfloat16", 1.0, 2 * 400_000), ("float32", 1.8, 0)):
        alone = plan(replace(setup, precision=precision))
        beside = plan(replace(setup, frozen=(FrozenNetwork("teacher", TOY, peak=1e5),), precision=precision))
        assert beside.memory["teacher"] == 4e6
        assert beside.memory["teacher activations"] == pytest.approx(factor * 32 * 1e5 + copy)
        # the teacher is the student's size here: its forward pass takes as long
        assert beside.seconds == alone.seconds | {"teacher": alone.seconds["forward"]}
