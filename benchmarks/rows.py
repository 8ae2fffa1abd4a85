"""Reading rows by number: from the mapped Arrow tables of shards ("arrow"), against one file that holds the same rows
one after another, each packed into bytes and read by `pread` ("packed"). Both in one run, in turn, in one and in two
processes.

python benchmarks/rows.py
python benchmarks/rows.py --shards 100 --count 10000      # a million rows
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from gligen_xl.data.rows import MappedTable, open_tables
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import Row, Shard, find_shards

WORDS = ("a", "the", "of", "with", "street", "people", "standing", "red", "building", "tree", "sky", "small", "white")
METADATA = {"resolution": "512", "vae": "x", "scaling_factor": "1"}
HEAD, PLACES = struct.Struct("<5i"), struct.Struct("<2q")


def make_shards(folder: Path, shards: int, count: int) -> None:
    """Writes rows with captions of 60 words and 5 to 20 boxes; all shards have the same, beside almost no latents."""
    rng, rows = np.random.default_rng(0), []
    for k in range(count):
        n = int(rng.integers(5, 21))
        corners = rng.uniform(0, 0.6, (n, 2))
        rows.append(
            Row(
                image_id=f"sa_{k:08}",
                caption=" ".join(rng.choice(WORDS, 60)),
                boxes=[tuple(box) for box in np.concatenate([corners, corners + 0.3], 1).tolist()],
                scores=rng.uniform(0.2, 0.8, n).tolist(),
                phrases=[" ".join(words) for words in rng.choice(WORDS, (n, 2))],
                original_height=1500,
                original_width=2250,
            )
        )
    latents = np.zeros((count, 1, 1, 1), np.float16)
    for number in range(shards):
        write_shard(folder / f"s{number:04}", latents, rows, METADATA)


class PackedRows:
    """The rows of all shards in one file, and where each begins."""

    def __init__(self, path: Path, shards: list[Shard]):
        places = [0]
        with path.open("wb") as file:
            for table in open_tables(shards):
                for k in range(len(shards[0])):
                    places.append(places[-1] + file.write(_pack(table.row(k))))
            self._places = places[-1]
            file.write(np.array(places, "<i8").tobytes())
        self._file = os.open(path, os.O_RDONLY)

    def row(self, number: int) -> Row:
        begin, end = PLACES.unpack(os.pread(self._file, PLACES.size, self._places + 8 * number))
        content = os.pread(self._file, end - begin, begin)
        count, height, width, top, left = HEAD.unpack_from(content)
        numbers = np.frombuffer(content, "<f4", 5 * count, HEAD.size).reshape(-1, 5).tolist()
        image_id, caption, *phrases = content[HEAD.size + 20 * count :].decode().split("\0")
        return Row(
            image_id=image_id,
            caption=caption,
            boxes=[tuple(box[:4]) for box in numbers],
            scores=[box[4] for box in numbers],
            phrases=phrases[:count],
            original_height=height,
            original_width=width,
            crop_top=top,
            crop_left=left,
        )


def _pack(row: Row) -> bytes:
    head = HEAD.pack(len(row.boxes), row.original_height, row.original_width, row.crop_top, row.crop_left)
    numbers = [(*box, score) for box, score in zip(row.boxes, row.scores, strict=True)]
    return head + np.array(numbers, "<f4").tobytes() + "\0".join([row.image_id, row.caption, *row.phrases]).encode()


def microseconds(read: Callable[[int], Row], rows: int, seed: int, count: int) -> float:
    """CPU time for a random row."""
    numbers = np.random.default_rng(seed).integers(0, rows, count).tolist()
    began = time.process_time()
    for number in numbers:
        read(number)
    return 1e6 * (time.process_time() - began) / count


def in_processes(read: Callable[[int], Row], rows: int, seed: int, count: int, processes: int) -> float:
    if processes == 1:
        return microseconds(read, rows, seed, count)
    with multiprocessing.get_context("fork").Pool(processes, _share, (read,)) as pool:
        return float(np.mean(pool.starmap(_in_process, [(rows, seed + k, count) for k in range(processes)])))


def _share(read: Callable[[int], Row]) -> None:
    global _read
    _read = read


def _in_process(rows: int, seed: int, count: int) -> float:
    return microseconds(_read, rows, seed, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--count", type=int, default=5000, help="rows of a shard")
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5, help="of both in turn; the ratio of the medians is shown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), options.shards, options.count)
        shards = find_shards(folder)
        packed = PackedRows(Path(folder) / "packed", shards)
        began, own = time.perf_counter(), _own_memory()
        tables: list[MappedTable] = open_tables(shards)
        print(f"opened {len(shards)} tables in {time.perf_counter() - began:.2f} s", end=", ")
        reads = {
            "packed": packed.row,
            "arrow": lambda number: tables[number // options.count].row(number % options.count),
        }
        rows = options.shards * options.count
        assert all(reads["packed"](k) == reads["arrow"](k) for k in range(0, rows, max(rows // 100, 1)))
        for processes in (1, 2):
            figures: dict[str, list[float]] = {name: [] for name in reads}
            for seed in range(options.rounds):
                for name, read in reads.items():
                    figures[name].append(in_processes(read, rows, seed, options.reads, processes))
            medians = {name: float(np.median(times)) for name, times in figures.items()}
            shown = ", ".join(f"{name} {median:.1f} us a row" for name, median in medians.items())
            print(f"{processes} processes: {shown}, ratio {medians['arrow'] / medians['packed']:.2f}")
        print(f"memory of the process itself: +{(_own_memory() - own) / 1e6:.1f} MB")


def _own_memory() -> int:
    """Bytes that are the process's alone; pages of mapped files can be taken back by the system at any time."""
    return sum(part.anonymous for part in psutil.Process().memory_maps())


if __name__ == "__main__":
    main()
