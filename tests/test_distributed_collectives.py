"""Collectives with gradient on 1, 2 and 4 ranks, ragged row counts, against plain autograd on one process."""

import functools

import pytest
import torch

from lvtrain.distributed.collectives import all_reduce_sum, gather_rows, true_everywhere
from tests.ranks import run_ranks

COUNTS = [3, 0, 5, 1]


def rows_of(rank):
    return torch.arange(COUNTS[rank] * 2, dtype=torch.float64).view(-1, 2) + 100 * rank


def loss_of(x, share):
    return ((x**3).sum(dim=1) * torch.arange(1.0, len(x) + 1, dtype=x.dtype)).sum() * share


def gathered(rank, ranks, known):
    x = rows_of(rank).requires_grad_()
    everything = gather_rows(x, sizes=COUNTS[:ranks] if known else None, gradient_scale=float(ranks))
    loss_of(
        everything, rank + 1.0
    ).backward()  # each rank its own part of the whole loss, as each rank has its own classes
    return everything.detach(), x.grad


def summed(rank):
    x = torch.full((3,), rank + 1.0, requires_grad=True)
    total = all_reduce_sum(x)
    (total**2).sum().backward()
    return total.detach(), x.detach(), x.grad


def everything(rank, ranks):
    return {known: gathered(rank, ranks, known) for known in (True, False)} | {
        "summed": summed(rank),
        "agreed": agreed(rank),
    }


def agreed(rank):
    return [true_everywhere(flag, torch.device("cpu")) for flag in (True, rank > 0, False)]


@functools.cache
def on(ranks):
    return run_ranks(ranks, everything)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("known", [True, False])
def test_gather_rows_and_its_gradient(ranks, known):
    whole = torch.cat([rows_of(rank) for rank in range(ranks)]).requires_grad_()
    sum(loss_of(whole, rank + 1.0) for rank in range(ranks)).backward()
    answers = [answer[known] for answer in on(ranks)]
    for got, _ in answers:
        assert torch.equal(got, whole.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in answers]), whole.grad * ranks, rtol=1e-15, atol=0)


def test_all_reduce_sum_leaves_its_input_and_passes_the_gradient():
    for rank, answer in enumerate(on(2)):
        total, x, gradient = answer["summed"]
        assert torch.equal(total, torch.full((3,), 3.0))
        assert torch.equal(x, torch.full((3,), rank + 1.0))
        assert torch.equal(gradient, torch.full((3,), 6.0))


def test_true_everywhere_is_the_same_on_every_rank():
    assert [answer["agreed"] for answer in on(2)] == [[True, False, False]] * 2


def test_without_a_process_group():
    assert [true_everywhere(flag, torch.device("cpu")) for flag in (True, False)] == [True, False]
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(x) is x
    assert all_reduce_sum(x) is x
