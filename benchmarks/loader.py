"""Reading for training: samples per second and memory of a worker, against a loader that loads each published shard
whole ("whole"). Both in one run, on the same samples, with the same fields delivered.

python benchmarks/loader.py
python benchmarks/loader.py --size 128 --shards 2 --count 2000      # latents of 1024 pixels

The other loader is the usual one for the published files: an iterable dataset that loads a pair of `.npy` files,
shuffles within it, and for each sample filters and converts the boxes, with the default collation. Its files are read
by the reader of `gligen_xl.contrib.sa1b.published`; as that reader checks what it reads, the time without reading is
shown, too. Memory is that of the process alone: pages of mapped files can be taken back by the system at any time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gligen_xl.contrib.sa1b.convert import import_published
from gligen_xl.contrib.sa1b.published import read_object_array
from gligen_xl.data.dataset import Augmentation, ShardDataset
from gligen_xl.data.loader import batches

SLOTS, MIN_SCORE, BATCH = 32, 0.25, 64
WORDS = ("a", "the", "of", "with", "street", "people", "standing", "red", "building", "tree", "sky", "small", "white")
FULL = 11_186  # images of a published shard


def make_published(root: Path, shards: int, images: int, size: int) -> None:
    """Pairs as they are published: latents (N, 4, size, size) float16, and captions and boxes of a usual length."""
    for kind in ("latents", "boxes"):
        (root / kind).mkdir(parents=True)
    for shard in range(shards):
        rng = np.random.default_rng(shard)
        indices = list(range(shard * 100_000, shard * 100_000 + images))
        content = np.empty((), object)
        noise = rng.standard_normal((images, 4, size, size), np.float32)
        content[()] = {"indices": indices, "latents": noise.astype(np.float16)}
        np.save(root / "latents" / f"sa_{shard:06}.npy", content, allow_pickle=True)
        boxes = np.empty((images, 6), object)
        for k, index in enumerate(indices):
            n = int(rng.integers(2, 20))
            corner, extent = rng.uniform(0, 0.6, (n, 2)), rng.uniform(0.05, 0.4, (n, 2))
            row = [
                index,
                " ".join(rng.choice(WORDS, 80)) + ".",
                np.concatenate([corner + extent / 2, extent], -1).astype(np.float16),
                rng.uniform(0.2, 0.8, n).astype(np.float16),
                [" ".join(words) for words in rng.choice(WORDS, (n, 2))],
                (1500, 2250),
            ]
            for j, value in enumerate(row):
                boxes[k, j] = value
        np.save(root / "boxes" / f"sa_{shard:06}.npy", boxes, allow_pickle=True)


class WholeShards(IterableDataset):
    """The other loader. Time that it spends on reading files is added up in its samples."""

    def __init__(self, root: Path):
        self.root, self.names = root, sorted(path.name for path in (root / "latents").iterdir())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        rng, reading = np.random.default_rng(first), 0.0
        for number in count(first, step):
            began = time.perf_counter()
            name = self.names[number % len(self.names)]
            content = read_object_array(self.root / "latents" / name).item()
            rows = {row[0]: row for row in read_object_array(self.root / "boxes" / name)}
            reading += time.perf_counter() - began
            for k in rng.permutation(len(content["indices"])):
                yield self.sample(content["latents"][k], rows[content["indices"][k]]) | {"reading": reading}

    def sample(self, latents: np.ndarray, row: np.ndarray) -> dict[str, Any]:
        _, caption, boxes, scores, phrases, (height, width) = row
        boxes = torch.from_numpy(np.asarray(boxes, np.float32))
        scores = torch.from_numpy(np.asarray(scores, np.float32))
        good = torch.nonzero(scores > MIN_SCORE).flatten()
        best = good[scores[good].argsort(descending=True)][:SLOTS]
        centre, extent = boxes[best].split(2, dim=-1)
        padded, mask = torch.zeros(SLOTS, 4), torch.zeros(SLOTS)
        padded[: len(best)] = torch.cat([centre - extent / 2, centre + extent / 2], dim=-1).clamp(0, 1)
        mask[: len(best)] = 1
        chosen = [phrases[k] for k in best.tolist()]
        side = 8 * latents.shape[-1]
        long = side * max(height, width) // min(height, width)
        crop = ((long - side) // 2, 0) if height > width else (0, (long - side) // 2)
        return {
            "latents": torch.from_numpy(latents),
            "caption": caption,
            "phrases": chosen + [""] * (SLOTS - len(chosen)),  # default collation wants equal lengths
            "boxes": padded,
            "mask": mask,
            "size": torch.tensor([height, width, *crop, side, side], dtype=torch.float32),
        }


@dataclass
class Measured:
    rate: float  # samples a second, one worker
    rate_without_reading: float
    growth: int  # largest growth of the worker's own memory, bytes


def own_memory(process: psutil.Process) -> int:
    """Bytes that are the process's alone, without pages of mapped files."""
    return sum(part.anonymous for part in process.memory_maps())


def measure(loader: Iterable, number: int) -> Measured:
    """Draws `number` batches, after the first few."""
    gc.collect()
    iterator = iter(loader)
    (worker,) = psutil.Process().children()
    before = own_memory(worker)
    first = [next(iterator) for _ in range(4)][-1]
    growth, began, last = 0, time.perf_counter(), first
    for k in range(number):
        last = next(iterator)
        if k % 50 == 0:
            growth = max(growth, own_memory(worker) - before)
    seconds = time.perf_counter() - began
    reading = float(last["reading"][-1] - first["reading"][-1]) if isinstance(last, dict) else 0.0
    samples = number * BATCH
    return Measured(samples / seconds, samples / (seconds - reading), growth)


def alone(kind: str, root: Path, number: int) -> Measured:
    """One loader, in a process that has nothing else."""
    torch.set_num_threads(1)
    if kind == "whole":
        return measure(DataLoader(WholeShards(root), batch_size=BATCH, num_workers=1), number)
    augmentation = Augmentation(drop_grounding=0, drop_caption=0, min_score=MIN_SCORE, slots=SLOTS)
    dataset = ShardDataset(root / "shards", augmentation, 0)
    order = dataset.order(BATCH, 0)
    return measure(batches(dataset, order, start=0, stop=(number + 10) * BATCH, workers=1), number)


def compare(root: Path, shards: int, images: int, size: int, rounds: int) -> None:
    """Both loaders in turn over the same images; of each the best round counts."""
    make_published(root, shards, images, size)
    import_published(root / "latents", root / "boxes", root / "shards")
    shard_bytes = (root / "latents" / "sa_000000.npy").stat().st_size
    for path in root.rglob("*"):  # into the page cache
        if path.is_file():
            path.read_bytes()
    measured: dict[str, list[Measured]] = {"whole": [], "ours": []}
    for _ in range(rounds):
        for kind, epochs in (("whole", 1), ("ours", 3)):
            words = [kind, str(root), str(epochs * shards * images // BATCH)]
            output = subprocess.run([sys.executable, __file__, "--alone", *words], stdout=subprocess.PIPE, check=True)
            measured[kind].append(Measured(**json.loads(output.stdout)))
    print(f"{shards} x {images} images, {shard_bytes / 1e6:.0f} MB a shard, one worker, batches of {BATCH}")
    rates = {}
    for kind, figures in measured.items():
        rates[kind] = max(of.rate for of in figures), max(of.rate_without_reading for of in figures)
        growth = max(of.growth for of in figures)
        print(
            f"  {kind:<6}{rates[kind][0]:8.0f} samples/s   {rates[kind][1]:8.0f} without reading files   "
            f"private memory +{growth / 1e6:.1f} MB, {100 * growth / shard_bytes:.1f} % of a shard"
        )
    ours, (theirs, without) = rates["ours"][0], rates["whole"]
    print(
        f"  ours: {ours / theirs:.1f} times the samples/s; {ours / without:.1f} times, were reading files free for it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--count", type=int, default=3000, help="images of a shard, where speed is measured")
    parser.add_argument("--full", type=int, default=FULL, help="images of the shard where memory is measured")
    parser.add_argument("--size", type=int, default=64, help="of latents, both ways: 64 is 512 pixels")
    parser.add_argument("--rounds", type=int, default=3, help="of both loaders in turn")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        kind, root, number = options.alone
        print(json.dumps(asdict(alone(kind, Path(root), int(number)))))
        return
    for shards, images in ((options.shards, options.count), (1, options.full)):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["GLIGEN_XL_CACHE"] = f"{folder}/cache"
            compare(Path(folder), shards, images, options.size, options.rounds)


if __name__ == "__main__":
    main()
