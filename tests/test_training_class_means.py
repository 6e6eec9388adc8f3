"""Class rows that begin at the means of pretrained embeddings: against plain sums, on 1 and 2 ranks, and by the front door."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lvtrain.backbones import create_backbone
from lvtrain.classifier import ShardedClassifier
from lvtrain.classifier.margins import CosFace
from lvtrain.data import ShardDataset
from lvtrain.data.subset import first_of_each
from lvtrain.distributed.world import World
from lvtrain.recipe.files import resolve
from lvtrain.training import initial
from lvtrain.weights.extract import decode
from tests.ranks import run_ranks
from tests.runs import TINY, events, metrics, output, recipe_file, run
from tests.shard_data import jpeg, make_dataset

SAMPLES, CLASSES = 43, 6
RECIPE = resolve(TINY | {"data": {"path": "unused"}})


def test_the_first_few_of_every_label() -> None:
    labels = np.array([2, 0, 2, 2, 1, 0, 2, 0, 0])
    assert first_of_each(labels, 2).tolist() == [0, 1, 2, 4, 5]
    assert first_of_each(labels, 9).tolist() == list(range(9))
    assert first_of_each(labels[:0], 3).tolist() == []


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_backbone("vit_nano", embedding_dim=32, image_size=112, dim=32, depth=1, heads=2)


def rows(rank: int, ranks: int, folder: str) -> tuple[int, torch.Tensor, torch.Tensor]:
    head = ShardedClassifier(CLASSES + 1, 32, margin=CosFace(), seed=3)  # the last class has no image
    fresh = head.weight.detach().clone()
    model = backbone().train()
    world = World(rank, ranks, rank, torch.device("cpu"))
    images = initial.start_from_means(head, model, ShardDataset(Path(folder)), RECIPE, world, batch=4)
    assert model.training
    return images, fresh, head.weight.detach()


def test_rows_are_the_means_of_their_classes_on_any_number_of_ranks(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", SAMPLES, CLASSES)
    (alone,) = run_ranks(1, rows, str(folder))
    two = run_ranks(2, rows, str(folder))
    assert torch.equal(torch.cat([part for *_, part in two]), alone[2]) and alone[0] == SAMPLES
    dataset, model = ShardDataset(folder), backbone().eval()
    sums = torch.zeros(CLASSES, 32)
    with torch.no_grad():
        for sample in range(SAMPLES):
            data, label = dataset.read(sample)
            sums[label] += F.normalize(
                model(torch.tensor(decode(data, 112)).permute(2, 0, 1)[None].sub(127.5).div(127.5))
            )[0]
    _, fresh, found = alone
    length = fresh.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        found[:CLASSES], F.normalize(sums) * length[:CLASSES], rtol=0, atol=1e-5 * length.max().item()
    )
    assert torch.equal(found[CLASSES], fresh[CLASSES])


def test_a_run_begins_at_the_means(tmp_path: Path) -> None:
    """All images of a class are the same here, so its centre begins exactly at their embedding."""
    folder = make_dataset(tmp_path / "data", 240, 12, replaced={sample: jpeg(sample // 20) for sample in range(240)})
    same = {
        "phases": [{"name": "only", "global_batch": 16, "micro_batches": 2}],
        "data": {"augmentation": "none"},
        "backbone": {"overrides": {"dim": 32, "depth": 2, "heads": 2, "mask_ratio": 0.0}},
    }
    first = recipe_file(tmp_path / "first", folder, name="first", checkpoint={"every": "100 steps"}, **same)
    assert run(first) == 0
    cos2 = {}
    for head, ranks in (("fresh", 1), ("means", 2)):
        start = {"path": str(tmp_path / "first/runs/first"), "classifier": head}
        schedule = {"total": "1 steps", "warmup": "0 steps"}
        recipe = recipe_file(tmp_path / head, folder, name=head, init_from=start, schedule=schedule, **same)
        assert run(recipe, ranks=ranks) == 0, output(recipe)
        cos2[head] = metrics(tmp_path / head / "runs" / head)[0]["cos2"]
    # not 1: a step in training normalises with its batch's statistics, which twelve steps have not made the running ones
    assert cos2["fresh"] < 0.5 < 0.75 < cos2["means"]
    assert events(tmp_path / "means/runs/means", "init_from")[0]["classifier"].split()[-2] == "192"
