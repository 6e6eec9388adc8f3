"""What an epoch served is counted: on any number of ranks, through a resume on another number, and where a loader errs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lvtrain.data import Loader, SampleOrder, ShardDataset
from lvtrain.data.epochs import EpochCount, EpochSums, EpochTally, counts, epoch_line, hash_sum, unfinished
from tests.ranks import run_ranks
from tests.shard_data import make_dataset

V, M = 4, 3  # 12 samples a step and 41 an epoch: steps cross an epoch's end
N, G = 41, V * M


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def serve(
    folder: Path,
    tallies: list[EpochTally],
    start: int,
    steps: int,
    fault: Callable[[int, np.ndarray], None] | None = None,
) -> list[int]:
    """Runs real loaders for `steps` steps as the trainer does. Returns the ids in the order they came."""
    size, seen = len(tallies), []
    for rank, tally in enumerate(tallies):
        with Loader(
            ShardDataset(folder), seed=1, block=8, micro_batch=M, micro_batches=V, rank=rank, size=size, start=start,
            backend="torch",
        ) as loader:  # fmt: skip
            for step in range(steps):
                for number in range(V // size):
                    batch = next(loader)
                    ids = batch.sample_ids.numpy()
                    if fault is not None and rank == 0:
                        fault(step, ids)
                    seen += ids.tolist()
                    tally.add(start + step * G + (rank * (V // size) + number) * M, ids, batch.bad_rows)
    return seen


def tally_of(size: int, stream: int = 0) -> list[EpochTally]:
    order = SampleOrder(N, 1, 8)
    return [EpochTally(order, rank, size, stream) for rank in range(size)]


def ended(tallies: list[EpochTally], stream: int) -> list[EpochCount]:
    return counts([part for tally in tallies if (part := tally.ended(stream)) is not None], N)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_image_once_on_any_number_of_ranks(folder: Path, size: int) -> None:
    tallies = tally_of(size)
    seen = serve(folder, tallies, 0, steps=7)  # 84 samples: two epochs and 2 more
    first, second = ended(tallies, 7 * G)
    assert (first.epoch, second.epoch) == (1, 2) and first.is_plain and second.is_plain
    assert first.served == first.distinct == second.served == second.distinct == N
    assert sum(count == 2 for count in Counter(seen).values()) == N - 2  # 2 of the third epoch came three times
    assert ended(tallies, 7 * G) == [], "an epoch is given once"
    (rest,) = unfinished([tally.sums for tally in tallies], N)
    assert (rest.epoch, rest.served, rest.complete, rest.exact, rest.is_plain) == (3, 2, False, None, False)


def test_a_resume_in_mid_epoch_on_another_number_of_ranks(folder: Path) -> None:
    """4 ranks, 2 ranks, 1 rank, through the JSON of a checkpoint; the second stop comes before the ended epoch is reported."""
    stream, state = 0, None
    for size, steps in ((4, 2), (2, 3), (1, 2)):
        tallies = tally_of(size, stream)
        for tally in tallies if state else []:
            tally.load_state(json.loads(state))
        serve(folder, tallies, stream, steps)
        stream += steps * G
        state = json.dumps(tallies[0].state([tally.sums for tally in tallies]))
    found = ended(tallies, stream)
    assert [(one.epoch, one.exact, one.distinct) for one in found] == [(1, True, N), (2, True, N)]


def repeat(step: int, ids: np.ndarray) -> None:
    """In one step a sample comes in place of its neighbour."""
    if step == 1:
        ids[0] = ids[1]


def leave_out(step: int, ids: np.ndarray) -> None:
    """From the third step on a rank is one sample ahead: the one it left out never comes."""
    if step >= 2:
        ids[:] = SampleOrder(N, 1, 8).at(np.arange(step * G + 1, step * G + 1 + len(ids)))


@pytest.mark.parametrize("fault", [repeat, leave_out])
@pytest.mark.parametrize("size", [1, 2])
def test_a_loader_that_repeats_or_leaves_out_a_sample_is_reported(
    folder: Path, size: int, fault: Callable[[int, np.ndarray], None]
) -> None:
    tallies = tally_of(size)
    serve(folder, tallies, 0, 4, fault)
    (count,) = ended(tallies, 4 * G)
    assert (
        count.exact is False and count.distinct is None and not count.is_plain and "warning" in epoch_line(count, size)
    )


def test_a_batch_that_is_lost_or_comes_twice_is_reported() -> None:
    ids = SampleOrder(N, 1, 8).at(range(N))
    for part in (ids[:-3], np.concatenate([ids, ids[:3]])):
        (tally,) = tally_of(1)
        tally.add(0, part[:N])
        tally.add(0, part[N:]) if len(part) > N else None
        (count,) = ended([tally], N)
        assert count.exact is False and count.served == len(part)


def test_what_was_left_out_is_named() -> None:
    (tally,) = tally_of(1)
    ids = SampleOrder(N, 1, 8).at(range(N))
    tally.add(0, ids[:10], bad_rows=(2, 9))
    tally.add(10, ids[10:14], finite=False)
    tally.skip(14, 30)
    tally.add(30, ids[30:])
    (count,) = ended([tally], N)
    assert count.exact and not count.is_plain
    assert (count.served, count.distinct, count.skipped) == (N - 16, N - 16, 16)
    assert (count.undecoded, count.nonfinite) == (2, 4)


def test_an_epoch_that_began_before_an_old_checkpoint_is_not_called_counted(folder: Path) -> None:
    tallies = tally_of(2, stream=2 * G)
    serve(folder, tallies, 2 * G, 5)
    first, second = ended(tallies, 7 * G)
    assert first.exact is None and first.uncounted == 2 * G and first.distinct is None
    assert second.exact is True


def test_the_hash_tells_multisets_apart() -> None:
    """Against sorting: equal sums where, and only where, the sorted ids are equal; among them sets with equal sums of powers."""
    rng = np.random.default_rng(3)
    base = rng.integers(0, 1000, 64)
    alike = [np.array([0, 3, 5, 6]), np.array([1, 2, 4, 7])]  # the same sum and the same sum of squares
    assert hash_sum(alike[0]) != hash_sum(alike[1])
    for _ in range(200):
        other = base.copy()
        other[rng.integers(64)] = rng.integers(0, 1000)
        rng.shuffle(other)
        assert (hash_sum(other) == hash_sum(base)) == (np.sort(other) == np.sort(base)).all()


def over_gloo(rank: int, size: int) -> list[dict[str, object]]:
    from lvtrain.distributed.world import gather_objects

    order, ids = SampleOrder(N, 1, 8), SampleOrder(N, 1, 8).at(range(N))
    tally = EpochTally(order, rank, size, 0)
    for first in range(rank * 5, N, size * 5):
        tally.add(first, ids[first : first + 5])
    return [asdict(count) for count in counts(gather_objects(tally.ended(N)), N)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_real_ranks_agree(size: int) -> None:
    answers = run_ranks(size, over_gloo)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0]["exact"] is True and answers[0][0]["distinct"] == N


def test_sums_wrap() -> None:
    whole = EpochSums(1, (1 << 64) - 1)
    whole.add(EpochSums(1, 2))
    assert (whole.served, whole.hashed) == (2, 1)
