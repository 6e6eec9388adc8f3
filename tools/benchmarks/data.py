"""CPU time an image costs on the way from a shard to a float32 batch, our path beside others in one run; index and order at 42.5 and 260 million.

CPU time (user + system of the process, all its threads) is what a shared machine's load blurs least; wall time stands beside it.
Every path ends in a float32 [batch, 3, 112, 112] tensor of randomly mirrored images, except those named `decode_only`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.data import Loader, ShardDataset
from lvtrain.data.index import RECORD, IndexWriter
from lvtrain.data.shard_writer import ShardWriter

SMALL = {"images": 512, "batch": 64, "batches": 4, "repeats": 1, "large": "1000000"}


def run(
    images: int = 4000,
    batch: int = 128,
    batches: int = 40,
    threads: int = 2,
    repeats: int = 3,
    large: str = "42474557,260890076",
    only: str = "",
) -> dict[str, Any]:
    """Medians of `repeats` interleaved rounds: microseconds an image; then opening an index and asking the order for positions."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = _make(folder / "data", images)
        paths = _paths(folder / "data", batch, threads)
        paths = {path: opened for path, opened in paths.items() if not only or path in only.split(",")}
        rounds: dict[str, list[tuple[float, float]]] = {path: [] for path in paths}
        for _ in range(repeats):
            for path, open_path in paths.items():
                rounds[path].append(_measure(open_path, batch, batches))
        sizes = {size: _large(folder / "large", int(size)) for size in large.split(",") if size}
    table = {
        path: {
            "cpu_us_per_image": round(statistics.median(cpu for cpu, _ in values), 1),
            "wall_us_per_image": round(statistics.median(wall for _, wall in values), 1),
        }
        for path, values in rounds.items()
    }
    ours = table.get("lvtrain_dali", {}).get("cpu_us_per_image", float("nan"))
    ratios = {f"lvtrain_dali / {path}": round(ours / row["cpu_us_per_image"], 2) for path, row in table.items()}
    return {
        "images": images,
        "jpeg_bytes_mean": round(stored / images),
        "batch": batch,
        "threads": threads,
        "repeats": repeats,
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "paths": table,
        "ratios": ratios,
        "index_and_order": sizes,
    }


def _make(folder: Path, images: int) -> int:
    """Textured 112x112 JPEGs of quality 95 in four shards; bytes of all images."""
    from PIL import Image

    writer, stored = IndexWriter(folder), 0
    for number, part in enumerate(np.array_split(np.arange(images), 4)):
        with ShardWriter(folder, f"shards/{number:06d}.tar") as shard:
            for sample in part.tolist():
                rng = np.random.default_rng(sample)
                low = Image.fromarray(rng.integers(0, 255, (14, 14, 3)).astype(np.uint8))
                pixels = np.asarray(low.resize((112, 112), Image.Resampling.BICUBIC)).astype(int)
                out = io.BytesIO()
                noisy = np.clip(pixels + rng.normal(0, 4, (112, 112, 1)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(out, "JPEG", quality=95)
                shard.add(f"{sample:09d}", out.getvalue(), sample % 100)
                stored += len(out.getvalue())
        made = shard.written
        writer.add_shard(made.name, made.size, made.sha256, made.offsets, made.lengths, made.labels)
    writer.close([str(label) for label in range(100)])
    return stored


def _measure(
    open_path: Callable[[], tuple[Callable[[], Any], Callable[[], None]]], batch: int, batches: int
) -> tuple[float, float]:
    step, close = open_path()
    for _ in range(4):
        step()
    cpu, wall = _cpu(), time.perf_counter()
    for _ in range(batches):
        step()
    cpu, wall = _cpu() - cpu, time.perf_counter() - wall
    close()
    return cpu / batches / batch * 1e6, wall / batches / batch * 1e6


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _paths(folder: Path, batch: int, threads: int) -> dict[str, Callable[[], Any]]:
    dataset = ShardDataset(folder)
    encoded = [dataset.read(sample)[0] for sample in range(min(len(dataset), 512))]

    def loader(backend: str) -> Any:
        made = Loader(
            dataset, seed=0, micro_batch=batch, virtual_batches=1, block=256, backend=backend, threads=threads
        )
        return lambda: next(made), made.close

    def decode_only(decode: Callable[[bytes], Any]) -> Any:
        turn = itertools.cycle(encoded)
        return lambda: [decode(next(turn)) for _ in range(batch)], lambda: None

    def per_image(decode: Callable[[bytes], np.ndarray]) -> Any:
        """A map-style dataset under torch's DataLoader, in this process: no cost of worker processes is counted against it."""
        from torch.utils.data import DataLoader

        def collate(samples: list[np.ndarray]) -> torch.Tensor:
            pixels = (
                torch.from_numpy(np.stack(samples))
                .permute(0, 3, 1, 2)
                .to(torch.float32, memory_format=torch.contiguous_format)
            )
            return pixels.sub_(127.5).div_(127.5)

        class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
            def __len__(self) -> int:
                return len(dataset)

            def __getitem__(self, sample: int) -> np.ndarray:
                image = decode(dataset.read(sample)[0])
                return np.ascontiguousarray(image[:, ::-1]) if sample % 2 else image

        batches = itertools.chain.from_iterable(
            DataLoader(Images(), batch, shuffle=True, collate_fn=collate, drop_last=True) for _ in itertools.count()
        )
        return lambda: next(batches), lambda: None

    def pillow() -> Any:
        """The usual chain: Pillow, ToTensor, Normalize, default collate."""
        from PIL import Image
        from torch.utils.data import DataLoader
        from torchvision import transforms

        chain = transforms.Compose(
            [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        )

        class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
            def __len__(self) -> int:
                return len(dataset)

            def __getitem__(self, sample: int) -> torch.Tensor:
                return chain(Image.open(io.BytesIO(dataset.read(sample)[0])).convert("RGB"))  # type: ignore[no-any-return]

        batches = itertools.chain.from_iterable(
            DataLoader(Images(), batch, shuffle=True, drop_last=True) for _ in itertools.count()
        )
        return lambda: next(batches), lambda: None

    paths: dict[str, Callable[[], Any]] = {"lvtrain_torch": lambda: loader("torch"), "dataloader_pillow": pillow}
    try:
        paths["dali_webdataset_reader"] = _dali_reader(dataset, batch, threads)
        paths["lvtrain_dali"] = lambda: loader("dali")
    except ImportError:
        pass
    try:
        import simplejpeg

        paths["decode_only_simplejpeg"] = lambda: decode_only(simplejpeg.decode_jpeg)
    except ImportError:
        pass
    try:
        import cv2

        paths["dataloader_cv2"] = lambda: per_image(
            lambda data: cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        )
    except ImportError:
        pass
    from torchvision.io import decode_jpeg

    def torchvision_decode(data: bytes) -> torch.Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    paths["decode_only_torchvision"] = lambda: decode_only(torchvision_decode)
    paths["dataloader_torchvision_io"] = lambda: per_image(
        lambda data: torchvision_decode(data).permute(1, 2, 0).numpy()
    )
    return paths


def _dali_reader(dataset: ShardDataset, batch: int, threads: int) -> Callable[[], Any]:
    """DALI's own reader of the same tars, its shuffle and its random flip, the same operations after it."""
    from nvidia.dali import fn, pipeline_def, types

    indexes = []
    for number in range(len(dataset.manifest.shards)):
        lines = [
            f"jpg {record['offset']} {record['length']} {dataset.describe(int(sample))[1]}.jpg"
            for sample, record in enumerate(dataset.index)
            if record["shard"] == number
        ]
        path = dataset.folder / f"{number}.idx"
        path.write_text(f"v1.2 {len(lines)}\n" + "".join(f"{line}\n" for line in lines))
        indexes.append(str(path))

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2, exec_dynamic=True)
    def graph() -> Any:
        encoded = fn.readers.webdataset(
            paths=[str(dataset.folder / shard.name) for shard in dataset.manifest.shards],
            index_paths=indexes,
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=1024,
        )
        return fn.crop_mirror_normalize(
            fn.decoders.image(encoded),
            dtype=types.FLOAT,
            mean=[127.5] * 3,
            std=[127.5] * 3,
            mirror=fn.random.coin_flip(),
            output_layout="CHW",
        )

    def open_path() -> Any:
        pipeline = graph()
        pipeline.build()
        return lambda: torch.from_dlpack(pipeline.run()[0].as_tensor()), lambda: None

    return open_path


_OPEN = """
import json, sys, time
import numpy as np
from lvtrain.data import SampleOrder, ShardDataset
def resident(): return {l.split(":")[0]: int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(("VmRSS", "RssAnon"))}
SampleOrder(10, 0, 4).at(range(10))
before, started = resident(), time.perf_counter()
dataset = ShardDataset(sys.argv[1])
opened, after = time.perf_counter() - started, resident()
order = SampleOrder(len(dataset), 0, 4096)
for step in range(50): dataset.records(order.at(range(step * 512, step * 512 + 512)))
read = resident()
cpu = time.process_time()
order.at(range(10**9, 10**9 + 5_000_000))
cpu = time.process_time() - cpu
print(json.dumps({"open_seconds": round(opened, 4), "open_mb": round(after["VmRSS"] - before["VmRSS"], 1),
  "process_mb_after_reading_50_batches": round(read["VmRSS"], 1), "of_it_private_mb": round(read["RssAnon"], 1),
  "order_million_positions_per_cpu_second": round(5 / cpu, 1)}))
"""


def _large(folder: Path, samples: int) -> dict[str, Any]:
    """A generated index of `samples` in shards of 10,000, its tars empty files of the right size (sparse)."""
    per_shard, length = 10_000, 4700
    folder = folder.with_name(f"{folder.name}_{samples}")
    (folder / "shards").mkdir(parents=True)
    writer = IndexWriter(folder)
    offsets = np.arange(per_shard, dtype=np.uint64) * 6656 + 512
    for number, start in enumerate(range(0, samples, per_shard)):
        count = min(per_shard, samples - start)
        name, size = f"shards/{number:06d}.tar", count * 6656 + 10_240
        with open(folder / name, "wb") as file:
            file.truncate(size)
        labels = np.arange(start, start + count) * 2_000_000 // samples
        writer.add_shard(name, size, "0" * 64, offsets[:count], np.full(count, length), labels)
    writer.close([str(label) for label in range(2_000_000)])
    code = subprocess.run([sys.executable, "-c", _OPEN, str(folder)], capture_output=True, text=True, check=True)
    index = (folder / "index.bin").stat().st_size
    (folder / "index.bin").unlink()
    return {"index_gib": round(index / 2**30, 3), "bytes_a_sample": RECORD.itemsize, **json.loads(code.stdout)}
