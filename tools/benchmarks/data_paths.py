"""The ways from a shard to a batch that `data` compares: ours, DALI's reader, torch's DataLoader, and only decoding."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lvtrain.data import Loader, ShardDataset


def paths(folder: Path, batch: int, threads: int) -> dict[str, Callable[[], Any]]:
    """Ways by name. Calling one opens it and returns (next batch, close)."""
    dataset = ShardDataset(folder)
    encoded = [dataset.read(sample)[0] for sample in range(min(len(dataset), 512))]

    def loader(backend: str, device: str = "cpu") -> Any:
        made = Loader(
            dataset,
            seed=0,
            micro_batch=batch,
            micro_batches=1,
            block=256,
            backend=backend,
            threads=threads,
            device=device,
        )
        return lambda: next(made), made.close

    def decode_only(decode: Callable[[bytes], Any]) -> Any:
        """Decodes on as many threads as ours: two busy cores of a machine are each slower than one."""
        pool = ThreadPoolExecutor(threads)
        turn = itertools.cycle(encoded)

        def share(some: list[bytes]) -> None:
            for data in some:
                decode(data)

        def step() -> None:
            some = [next(turn) for _ in range(batch)]
            for part in [pool.submit(share, some[first::threads]) for first in range(threads)]:
                part.result()

        return step, pool.shutdown

    def per_image(decode: Callable[[bytes], np.ndarray]) -> Any:
        """A map-style dataset with torch's DataLoader in this process, so worker processes cost it nothing."""
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

    found: dict[str, Callable[[], Any]] = {
        "lvtrain_torch": lambda: loader("torch"),
        # to a device without memory or time: only the host's work is left
        "lvtrain_torch_host_of_gpu": lambda: loader("torch", "meta"),
        "dataloader_pillow": pillow,
    }
    try:
        found["dali_webdataset_reader"] = _dali_reader(dataset, batch, threads)
        found["lvtrain_dali"] = lambda: loader("dali")
        found["decode_only_dali"] = lambda: _dali_decoder(encoded, batch, threads)
    except ImportError:
        pass
    try:
        import simplejpeg

        found["decode_only_simplejpeg"] = lambda: decode_only(simplejpeg.decode_jpeg)
    except ImportError:
        pass
    try:
        import cv2

        found["dataloader_cv2"] = lambda: per_image(
            lambda data: np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
        )
    except ImportError:
        pass
    from torchvision.io import decode_jpeg

    def torchvision_decode(data: bytes) -> torch.Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    found["decode_only_torchvision"] = lambda: decode_only(torchvision_decode)
    found["dataloader_torchvision_io"] = lambda: per_image(
        lambda data: torchvision_decode(data).permute(1, 2, 0).numpy()
    )
    return found


def _dali_decoder(encoded: list[bytes], batch: int, threads: int) -> Any:
    """Only DALI's decoder: the least that our path could cost."""
    from nvidia.dali import fn, pipeline_def, types

    turn = itertools.cycle([np.frombuffer(data, dtype=np.uint8) for data in encoded])

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2, exec_dynamic=True)  # type: ignore[call-overload, untyped-decorator]
    def graph() -> Any:
        source = fn.external_source(lambda: list(itertools.islice(turn, batch)), dtype=types.DALIDataType.UINT8, ndim=1)
        return fn.decoders.image(source)

    pipeline = graph()
    pipeline.build()
    return lambda: pipeline.run(), lambda: None


def _dali_reader(dataset: ShardDataset, batch: int, threads: int) -> Callable[[], Any]:
    """DALI's reader of the same tars, with its shuffle and random flip, and the same operations after it."""
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

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2, exec_dynamic=True)  # type: ignore[call-overload, untyped-decorator]
    def graph() -> Any:
        encoded = fn.readers.webdataset(
            paths=[str(dataset.folder / shard.name) for shard in dataset.manifest.shards],
            index_paths=indexes,
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=1024,
        )
        return fn.crop_mirror_normalize(
            fn.decoders.image(encoded),  # type: ignore[arg-type]
            dtype=types.DALIDataType.FLOAT,
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
