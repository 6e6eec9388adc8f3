"""Banks against loops written from the papers' formulas, and bit for bit equal whatever the order, the split or a restart."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lvtrain.classifier.banks import CentreBank, ExpectationBank
from lvtrain.errors import UserError

CLASSES, DIM = 37, 11


def batches(steps: int, size: int = 23, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for step in range(steps):
        labels = torch.randint(-1, CLASSES, (size + step,), generator=generator)  # ragged, with ignored and repeated
        out.append((torch.randn(size + step, DIM, generator=generator) * 7, labels))
    return out


def weight() -> Tensor:
    return torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))


def make(kind: str, rows: tuple[int, int] = (0, CLASSES)) -> ExpectationBank | CentreBank:
    if kind == "centre":
        return CentreBank(CLASSES, DIM, rows, window=5)
    bank = ExpectationBank(CLASSES, DIM, rows)
    if kind == "weight":
        bank.start_from(weight()[rows[0] : rows[1]])
    return bank


def normalised(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def expectation_by_loop(init: str, steps: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    table = {j: normalised(weight()[j].double()) for j in range(CLASSES)} if init == "weight" else {}
    for embeddings, labels in steps:
        for j in sorted({int(label) for label in labels if label >= 0}):
            direction = normalised(sum(normalised(x.double()) for x, y in zip(embeddings, labels) if y == j))
            if j not in table:
                table[j] = direction
                continue
            alpha = 1 / (1 + math.exp(-float(table[j] @ direction)))
            table[j] = normalised(alpha * table[j] + (1 - alpha) * direction).float().double()
    return table


@pytest.mark.parametrize("init", ["weight", "first_feature"])
def test_expectation_follows_the_formula(init: str) -> None:
    steps = batches(4, size=9)
    bank = make(init)
    for embeddings, labels in steps:
        bank.update(embeddings, labels)
    expected = expectation_by_loop(init, steps)
    assert set(bank.valid.nonzero().flatten().tolist()) == set(expected)
    for j in range(CLASSES):
        if j in expected:
            assert torch.allclose(bank.rows_tensor[j].double(), expected[j], atol=3e-7)
        else:
            assert (bank.rows_tensor[j] == 0).all()
    norms = bank.rows_tensor[bank.valid].double().norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


def test_centres_and_concentration_follow_a_record_of_all_features() -> None:
    """Phi by running sums equals phi over the stored features (each with the centre it met)."""
    bank = CentreBank(CLASSES, DIM, (0, CLASSES), momentum=0.9, window=1000, alpha=10.0)
    centres: dict[int, Tensor] = {}
    record: dict[int, list[float]] = {}
    for embeddings, labels in batches(12):
        bank.update(embeddings, labels)
        for j in sorted({int(label) for label in labels if label >= 0}):
            features = [normalised(x.double()) for x, y in zip(embeddings, labels) if y == j]
            direction = normalised(sum(features))
            if j in centres:
                record.setdefault(j, []).extend(float((x - centres[j]).norm()) for x in features)
                centres[j] = normalised(0.9 * centres[j] + 0.1 * direction).float().double()
            else:
                centres[j] = direction.float().double()
    phi = bank.concentration()
    for j in range(CLASSES):
        if j in record:
            z = len(record[j])
            assert int(bank.count[j]) == z
            assert float(phi[j]) == pytest.approx(sum(record[j]) / (z * math.log(z + 10.0)), rel=1e-5)
            assert torch.allclose(bank.rows_tensor[j].double(), centres[j], atol=3e-7)
        else:
            assert not bank.measured[j] and float(phi[j]) == 0
    assert len(record) > 30


def test_concentration_of_settled_clusters_is_pcls() -> None:
    """With steady features, phi approaches the definition over the Z most recent features and the present centre."""
    generator = torch.Generator().manual_seed(5)
    means = torch.nn.functional.normalize(torch.randn(3, 32, generator=generator))
    spread = torch.tensor([0.02, 0.1, 0.3])
    bank = CentreBank(3, 32, (0, 3), window=60)
    recent: list[list[Tensor]] = [[], [], []]
    for _ in range(80):
        labels = torch.arange(3).repeat(4)
        features = means[labels] + spread[labels, None] * torch.randn(12, 32, generator=generator)
        bank.update(features, labels)
        for x, y in zip(torch.nn.functional.normalize(features), labels):
            recent[y] = [*recent[y][-59:], x]
    phi = bank.concentration()
    for j in range(3):
        distances = (torch.stack(recent[j]).double() - bank.rows_tensor[j].double()).norm(dim=1)
        assert float(phi[j]) == pytest.approx(float(distances.sum() / (60 * math.log(70))), rel=0.06)
    assert phi[0] < phi[1] < phi[2]


def test_window_forgets() -> None:
    """Beyond the window old distances fade: from scattered to tight, phi ends near the tight value."""
    bank = CentreBank(1, 8, (0, 1), window=10)
    generator = torch.Generator().manual_seed(0)
    direction = torch.zeros(1, 8)
    direction[0, 0] = 1.0
    for noise, steps in ((1.0, 20), (0.0, 120)):
        for _ in range(steps):
            bank.update(direction + noise * torch.randn(1, 8, generator=generator), torch.tensor([0]))
    assert float(bank.mean_distance[0]) < 1e-3 and int(bank.count[0]) == 10
    bank.update(direction.repeat(25, 1), torch.zeros(25, dtype=torch.int64))  # more at once than the window
    assert int(bank.count[0]) == 10


@pytest.mark.parametrize("kind", ["weight", "first_feature", "centre"])
def test_order_and_split_do_not_matter(kind: str) -> None:
    steps = batches(6, size=200)
    whole = make(kind)
    bounds = [0, 5, 5, 20, CLASSES]  # an empty rank among them
    parts = [make(kind, (start, stop)) for start, stop in pairwise(bounds)]
    for number, (embeddings, labels) in enumerate(steps):
        whole.update(embeddings, labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(number))
        for part in parts:
            part.update(embeddings[order], labels[order])
    for name, tensor in whole.state().items():
        assert torch.equal(torch.cat([part.state()[name] for part in parts]), tensor), name


@pytest.mark.parametrize("kind", ["weight", "first_feature", "centre"])
def test_labels_of_the_host_give_the_same_bits(kind: str) -> None:
    waiting, informed = make(kind, (3, CLASSES)), make(kind, (3, CLASSES))
    for embeddings, labels in batches(6, size=200):
        expected = labels.flip(0)
        labels = labels.clone()
        labels[::9] = -1  # images that cannot be decoded; the index still has their label
        labels[labels == 7] = -1  # all of one class
        waiting.update(embeddings, labels)
        informed.update(embeddings, labels, expected)
    for name, tensor in waiting.state().items():
        assert torch.equal(informed.state()[name], tensor), name
    assert bool(informed.valid.any())


@pytest.mark.parametrize("kind", ["weight", "first_feature", "centre"])
def test_state_resumes_bitwise(kind: str) -> None:
    steps = batches(6)
    through, before = make(kind), make(kind)
    for embeddings, labels in steps:
        through.update(embeddings, labels)
    for embeddings, labels in steps[:3]:
        before.update(embeddings, labels)
    after = make(kind)
    after.load_state({name: tensor.clone() for name, tensor in before.state().items()})
    for embeddings, labels in steps[3:]:
        after.update(embeddings, labels)
    for name, tensor in through.state().items():
        assert torch.equal(after.state()[name], tensor), name
    assert all(len(tensor) == CLASSES for tensor in through.state().values())


@pytest.mark.parametrize("kind", ["weight", "centre"])
def test_nothing_or_cancelling_samples_move_nothing(kind: str) -> None:
    bank = make(kind)
    bank.start_from(weight())
    before = bank.rows_tensor.clone()
    bank.update(torch.randn(3, DIM), torch.tensor([-1, -1, -1]))
    bank.update(torch.randn(0, DIM), torch.zeros(0, dtype=torch.int64))
    x = torch.randn(1, DIM)
    bank.update(torch.cat([x, -x]), torch.tensor([4, 4]))
    assert torch.allclose(bank.rows_tensor, before, atol=1e-6)
    assert torch.isfinite(bank.rows_tensor).all()


def test_half_precision_embeddings_are_welcome() -> None:
    bank = make("weight")
    embeddings, labels = batches(1)[0]
    bank.update(embeddings.to(torch.bfloat16), labels)
    assert bank.rows_tensor.dtype == torch.float32 and torch.isfinite(bank.rows_tensor).all()


def test_mistakes_are_named() -> None:
    bank = make("centre")
    with pytest.raises(UserError, match="centre_mean_distance"):
        bank.load_state({"centre": bank.rows_tensor})
    with pytest.raises(UserError, match="shape"):
        bank.load_state({name: tensor[:-1] for name, tensor in bank.state().items()})
    with pytest.raises(UserError, match="momentum"):
        CentreBank(3, 2, (0, 3), momentum=1.0)
    with pytest.raises(ValueError, match="rows"):
        bank.start_from(weight()[1:])
