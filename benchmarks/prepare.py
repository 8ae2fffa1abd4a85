"""What the preparation of images costs: sizes, decoding, processes, overlap, memory; ratios in one run.

Archives like SA-1B's are made first: JPEGs of 1500 x 2250 pixels, about 1 MB each, with a `.json` beside each.

python benchmarks/prepare.py
python benchmarks/prepare.py --pictures 200 --repeats 5
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from gligen_xl.images.decode import image_size
from gligen_xl.prepare.framing import Framing, frame_image

HEIGHT, WIDTH = 1500, 2250


def photograph(seed: int) -> bytes:
    """A JPEG of about 1 MB with structure at every scale, as photographs have."""
    rng = np.random.default_rng(seed)
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for side, weight in ((6, 60), (24, 40), (96, 25), (384, 14), (1500, 10)):
        field = rng.normal(size=(side, side * 3 // 2, 3)).clip(-2, 2)
        small = Image.fromarray(((field / 4 + 0.5) * 255).astype(np.uint8))
        image += weight * (np.asarray(small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32) / 63.75 - 2)
    written = io.BytesIO()
    Image.fromarray((image + 128).clip(0, 255).astype(np.uint8)).save(written, "JPEG", quality=88)
    return written.getvalue()


def make_archive(path: Path, images: list[bytes], count: int) -> None:
    """As SA-1B's: `count` images, the given ones over and over."""
    with tarfile.open(path, "w") as archive:
        for k in range(count):
            about = {"image": {"image_id": k, "width": WIDTH, "height": HEIGHT, "file_name": f"sa_{k}.jpg"}}
            annotations = {"annotations": [{"segmentation": {"counts": "x" * 900}} for _ in range(100)]}
            entries = ((".jpg", images[k % len(images)]), (".json", json.dumps(about | annotations).encode()))
            for ending, data in entries:
                member = tarfile.TarInfo(f"sa_{k}{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def seconds(work, repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return taken


def turns(works: dict, repeats: int) -> dict[str, list[float]]:
    """Every work in turn, so that a noisy minute hits all."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name] += seconds(work, 1)
    return taken


def ratio(first: list[float], second: list[float]) -> float:
    """Median of how many times as long the first took, turn by turn."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def decoding(images: list[bytes], repeats: int) -> None:
    full, fast = (Framing(resolutions=(512,), fast_jpeg=fast) for fast in (False, True))
    works = {
        "size": lambda: [image_size(image) for image in images],
        "full": lambda: [frame_image(image, None, full) for image in images],
        "fast": lambda: [frame_image(image, None, fast) for image in images],
    }
    taken = turns(works, repeats)
    for name, values in taken.items():
        print(f"{name:>5}: {len(images) / statistics.median(values):9.1f} pictures/s")
    print(f"reading sizes: {ratio(taken['full'], taken['size']):.0f} times a full decode")
    print(f"--fast-jpeg at 512: {ratio(taken['full'], taken['fast']):.2f} times a full decode")
    differences = []
    for image in images:
        one, other = (frame_image(image, None, framing).pixels[0].astype(int) for framing in (full, fast))
        differences.append(np.abs(one - other))
    print(f"its difference: mean {np.mean(differences):.2f} of 255, at most {np.max(differences)}")


def command(archives: Path, out: Path, *more: str) -> dict:
    """A preparation in a process of its own; its report, and the peak memory of it and of its decoding processes."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["-m", "gligen_xl.cli", "prepare", str(archives), "--vae", "shapes", "--out", str(out), *more]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=settings
    ) as run:
        watched, peak = psutil.Process(run.pid), 0
        while run.poll() is None:
            with suppress(psutil.Error):  # one of them has just ended
                peak = max(peak, sum(part.memory_info().rss for part in (watched, *watched.children(recursive=True))))
            time.sleep(0.05)
        if run.returncode:
            raise RuntimeError(run.stderr.read().decode()[-2000:])
    return json.loads((out / "prepare.json").read_text()) | {"peak_mib": peak / 2**20}


def working_seconds(report: dict) -> float:
    """Without the start of the processes."""
    return round(report["seconds"]["all"] - report["seconds"].get("start", 0), 2)


def processes(archives: Path, out: Path, repeats: int) -> None:
    """Decoding alone is the work: the embedded VAE at 64 pixels takes a few milliseconds."""
    taken: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for workers in taken:
            report = command(archives, out, "--resolution", "64", "--workers", str(workers))
            taken[workers].append(working_seconds(report))
    print(f"two workers: {ratio(taken[1], taken[2]):.2f} times one ({taken[1]}, {taken[2]} s)")


def overlap(archives: Path, out: Path, repeats: int) -> None:
    """The embedded VAE at 256 pixels takes about as long as decoding: beside it, or after it."""
    taken: dict[int, list[float]] = {0: [], 1: []}
    busy: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(repeats):
        for workers in taken:
            report = command(archives, out, "--resolution", "256", "--workers", str(workers))
            taken[workers].append(working_seconds(report))
            busy[workers].append(report["share_of_time_device_was_busy"])
    for workers, name in ((0, "one after the other"), (1, "decoding beside encoding")):
        print(f"{name}: {statistics.median(taken[workers]):.1f} s, device busy {statistics.median(busy[workers]):.0%}")
    print(f"overlap: {ratio(taken[0], taken[1]):.2f} times")


def memory(folder: Path, images: list[bytes], out: Path, counts: tuple[int, int]) -> None:
    for count in counts:
        archives = folder / f"memory-{count}"
        archives.mkdir()
        make_archive(archives / "sa_000000.tar", images, count)
        report = command(archives, out, "--resolution", "64", "--workers", "1")
        shutil.rmtree(archives)
        print(f"an archive of {count} images: peak {report['peak_mib']:.0f} MiB, with its decoding process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=120, help="in the archive")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder, out = Path(name), Path(name) / "out"
        images = [photograph(seed) for seed in range(8)]
        print(f"JPEGs of {HEIGHT} x {WIDTH}, {statistics.mean(map(len, images)) / 1e6:.2f} MB each")
        decoding(images, arguments.repeats)
        archives = folder / "archives"
        archives.mkdir()
        make_archive(archives / "sa_000000.tar", images, arguments.pictures)
        processes(archives, out, arguments.repeats)
        overlap(archives, out, arguments.repeats)
        memory(folder, images, out, (arguments.pictures, 6 * arguments.pictures))


if __name__ == "__main__":
    main()
