"""One unit to its shards: read and decoded ahead in other processes, detected and encoded on the device, written.

    source -> [read, caption]  -> [decode, frame]  -> [detect] -> [encode] -> [write]
              a thread            processes           this thread, on the device

Images stay in their order throughout, so the shards do not depend on how many processes there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data.shard_writer import ShardWriter
from ..data.shards import Row, latents_file, read_header, remove_shard, table_files
from ..detect.detection import CaptionGrounder
from ..detect.grounder import find_grounder
from ..images.crop import BUCKET_GRID
from ..limits import MAX_BATCH, MAX_WORKERS
from ..redact import public_name
from .captions.table import CaptionTable
from .decoding import Decoders
from .encode import Encoder, load_vae
from .framing import Framed, Framing, Reason
from .item import BAD_TEXT, Item, Skipped, Unit, skipped, text_fault
from .report import UnitReport
from .settings import WORK_FOLDER, Settings
from .sources.archives import Archive
from .sources.tars import count_unread
from .views import views

NO_CAPTION, TOO_FEW, NOT_FINITE = "no caption", "too few boxes", "its latents are not finite"

_Entry = tuple[int, np.ndarray, Row]  # place in the batch, image (h, w, 3) uint8, row
Progress = Callable[[int, int], None]  # called with the weight and the images that came to an end since the last call


def no_progress(weight: int, images: int) -> None:
    """Show nothing."""


class UnitMaker:
    """Makes shards of units under `out`; models are loaded and processes started once.

    Args:
        out: with several resolutions, each has a folder of its own in it.
        workers: decoding processes; 0 decodes in this one.
        device: of the VAE and the detector.
        batch_size: images that are detected and encoded together.
    """

    def __init__(
        self, out: str | Path, settings: Settings, *, workers: int = 0, device: str = "cpu", batch_size: int = 8
    ):
        if not 0 <= workers <= MAX_WORKERS or not 1 <= batch_size <= MAX_BATCH:
            raise ValueError(
                f"workers is {workers}, batch_size {batch_size}; expected 0 to {MAX_WORKERS}, and 1 to {MAX_BATCH}"
            )
        self.out, self.settings, self.batch_size = Path(out), settings, batch_size
        dtype = getattr(torch, settings.dtype)
        seed = settings.seed if settings.latents == "sample" else None
        self.encoder = Encoder(load_vae(settings.vae), device=device, dtype=dtype, seed=seed, at_once=settings.at_once)
        _check_resolutions(settings.framing, self.encoder.downsampling)
        self.detector = None
        if settings.detector is not None:
            self.detector = find_grounder(
                settings.detector,
                box_threshold=settings.box_threshold,
                text_threshold=settings.text_threshold,
                text=settings.detect_text,
                device=device,
                dtype=dtype,
                batch_size=settings.at_once,
            )
        self.captions = None
        if settings.captions is not None:
            self.captions = open_captions(settings.captions, self.out / WORK_FOLDER)
        self.decoders = Decoders(workers, settings.framing, batch_size)

    def make(self, unit: Unit, progress: Progress = no_progress) -> tuple[UnitReport, list[str]]:
        """Write the shards of a unit: all of them once it is read to its end, or none.

        Returns:
            what became of its images, and the shards, as paths under `out`.

        Raises:
            ValueError, OSError, RuntimeError: the unit cannot be read to its end, or its shards not be written.
        """
        report, begin, repeated, cut = UnitReport(), time.perf_counter(), self.encoder.repeated, self._cut_texts
        writers = _Writers(self.out, unit.name, self.settings, self.encoder)
        try:
            batch: list[tuple[Item, Framed]] = []
            for item, framed in self._framed(unit, report, progress):
                batch.append((item, framed))
                if len(batch) == self.batch_size:
                    self._encode(batch, writers, report)
                    batch.clear()
            if batch:
                self._encode(batch, writers, report)
            with report.timed("write"):
                names = writers.commit()
        finally:
            writers.discard()
        report.repeated_in_float32 = self.encoder.repeated - repeated
        report.cut_texts = self._cut_texts - cut
        if self.captions is not None:
            report.captions = asdict(self.captions.counts)
        report.spend("all", time.perf_counter() - begin)
        return report, names

    @property
    def _cut_texts(self) -> int:
        return self.detector.cut_texts if self.detector is not None else 0

    def close(self) -> None:
        self.decoders.close()
        if self.captions is not None:
            self.captions.close()

    def __enter__(self) -> UnitMaker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Read, caption, decode --------------------------------------------------------------------------------------

    def _framed(self, unit: Unit, report: UnitReport, progress: Progress) -> Iterator[tuple[Item, Framed]]:
        """Give the images that can be used, in their order, and count the others."""
        behind = 0
        for item, framed in self.decoders.decode(self._read(unit, report), report):
            report.seen += 1
            progress(item.done - behind, 1)
            behind = item.done
            count_unread(report.unread, item.unread)
            if isinstance(item, Skipped):
                report.skip(item.image_id, item.reason, _example(item.place, item.detail))
            elif isinstance(framed, Reason):
                report.skip(item.image_id, str(framed), _example(item.place, framed.detail))
            elif framed is not None:
                report.spend("decode", framed.seconds)
                for reason, number in item.dropped.items():
                    report.drop(reason, number, _example(item.place, item.dropped_examples.get(reason, "")))
                yield item, framed
        if isinstance(unit, Archive):
            count_unread(report.unread, unit.reading.unread)
        progress(unit.weight - behind, 0)

    def _read(self, unit: Unit, report: UnitReport) -> Iterator[Item | Skipped]:
        """Give the images of the source, with their captions."""
        needed = self.captions is not None or (self.detector is not None and self.detector.reads_captions)
        items = unit.items()
        while True:
            with report.timed("read"):
                item = next(items, None)
                if item is not None:
                    item = captioned(item, self.captions, needed=needed)
            if item is None:
                return
            yield item

    # Detect, encode, write ---------------------------------------------------------------------------------------

    def _encode(self, batch: Sequence[tuple[Item, Framed]], writers: _Writers, report: UnitReport) -> None:
        if self.detector is not None:
            with report.timed("detect"):
                batch = self._detect(self.detector, batch)
        used: set[int] = set()  # places in the batch
        lost: dict[int, str] = {}  # places of those that lack a row, and why
        for place in range(len(self.settings.framing.resolutions)):
            groups: dict[tuple[int, int], list[_Entry]] = {}
            for number, (item, framed) in enumerate(batch):
                frame = framed.frames[place]
                rows = list(views(item, frame, framed.pixels[place], self.settings, report))
                if not rows:
                    lost.setdefault(number, TOO_FEW)
                for pixels, row in rows:
                    groups.setdefault(frame.size, []).append((number, pixels, row))
            for size, group in groups.items():
                finite = self._write(group, place, size, writers, report)
                used.update(number for (number, _, _), good in zip(group, finite, strict=True) if good)
                for k in np.flatnonzero(~finite):
                    lost.setdefault(group[k][0], NOT_FINITE)
        report.used += len(used)
        for number, reason in sorted(lost.items()):
            if number in used:
                report.incomplete[reason] += 1
            else:
                item = batch[number][0]
                report.skip(item.image_id, reason, _example(item.place, self._detail(item, reason)))

    def _detail(self, item: Item, reason: str) -> str:
        if reason == NOT_FINITE:
            return "the VAE gave infinities or NaN, in float32 too"
        return f"it has {len(item.boxes)} boxes before those are dropped; expected {self.settings.min_boxes} that stay"

    def _write(
        self, group: list[_Entry], place: int, size: tuple[int, int], writers: _Writers, report: UnitReport
    ) -> np.ndarray:
        """Encode images of one size and write those whose latents are finite: (n,) bool."""
        with report.timed("encode"):
            latents, finite = self.encoder([pixels for _, pixels, _ in group], [row.image_id for _, _, row in group])
        rows = [row for (_, _, row), good in zip(group, finite, strict=True) if good]
        with report.timed("write"):
            writers.add(place, size, latents[finite], rows)
        report.written += len(rows)
        report.boxes += sum(len(row.boxes) for row in rows)
        report.rows_without_boxes += sum(not row.boxes for row in rows)
        report.bytes += latents[finite].nbytes
        return finite

    def _detect(self, detector: CaptionGrounder, batch: Sequence[tuple[Item, Framed]]) -> list[tuple[Item, Framed]]:
        """Give the same images the boxes that are detected in their first frame."""
        every = detector.ground([framed.pixels[0] for _, framed in batch], [item.caption for item, _ in batch])
        result = []
        for (item, framed), detections in zip(batch, every, strict=True):
            boxes = np.array([detection.box for detection in detections], np.float64)
            phrases = [detection.label for detection in detections]
            scores = [detection.score for detection in detections]
            whole = framed.frames[0].back(boxes).tolist()
            result.append((replace(item, boxes=whole, phrases=phrases, scores=scores), framed))
        return result


class _Writers:
    """The shards of a unit: one for each resolution and latent shape, begun when their first image comes."""

    def __init__(self, out: Path, name: str, settings: Settings, encoder: Encoder):
        self.out, self.name, self.settings, self.encoder = out, name, settings, encoder
        self.writers: dict[str, ShardWriter] = {}

    def add(self, place: int, size: tuple[int, int], latents: np.ndarray, rows: list[Row]) -> None:
        if not rows:
            return
        framing = self.settings.framing
        resolution = framing.resolutions[place]
        name = f"{self.name}-{size[0]}x{size[1]}" if framing.buckets else self.name
        path = f"{resolution}/{name}" if len(framing.resolutions) > 1 else name
        if path not in self.writers:
            self._check_place(self.out / path)
            name = public_name(self.settings.vae, hub=True)  # shards are shared
            metadata = {"resolution": str(resolution), "vae": name, **self.encoder.metadata}
            metadata["prepared"] = self.settings.fingerprint
            self.writers[path] = ShardWriter(self.out / path, latents.shape[1:], metadata)
        self.writers[path].add(latents, rows)

    def _check_place(self, stem: Path) -> None:
        """Shards that something else has made are not written over."""
        latents = latents_file(stem)
        if latents.is_file():  # alone, after a kill between the two
            ours = read_header(latents)[0].get("prepared") == self.settings.fingerprint
        else:
            ours = not any(table.is_file() for table in table_files(stem))
        if not ours:
            raise ValueError(f"the shard {stem} stands there, made otherwise; remove it, or choose another folder")

    def commit(self) -> list[str]:
        """Move all shards to their places; if one cannot be moved, none stays."""
        try:
            for path in sorted(self.writers):
                self.writers[path].commit()
        except BaseException:
            for path in self.writers:
                remove_shard(self.out / path)
            raise
        return sorted(self.writers)

    def discard(self) -> None:
        for writer in self.writers.values():
            writer.discard()


def captioned(item: Item | Skipped, captions: CaptionTable | None, *, needed: bool) -> Item | Skipped:
    """Give an image the caption that is joined to it, or the reason why it is left out.

    Args:
        needed: an image without a caption is left out.
    """
    if isinstance(item, Skipped):
        return item
    if captions is not None:
        item = replace(item, caption=captions.get(item.image_id) or "")
    if fault := next(filter(None, map(text_fault, (item.caption, *item.phrases))), ""):
        return skipped(item, BAD_TEXT, fault)
    if needed and not item.caption.strip():
        lack = "no id of the captions ends as" if captions is not None else "the detector looks for what one names:"
        return skipped(item, NO_CAPTION, f"{lack} {item.image_id!r:.80}")
    return item


def _example(place: str, detail: str) -> str:
    return f"{place}: {detail}" if detail else ""


def open_captions(source: str, folder: Path) -> CaptionTable:
    """Open the table of captions in `folder`. It is built first if needed, which takes minutes for ten million."""
    with tqdm(desc="reading captions", unit="caption", unit_scale=True, leave=False, disable=None) as bar:

        def show(count: int) -> None:
            bar.update(count - bar.n)

        return CaptionTable.open(source, folder, progress=show)


def _check_resolutions(framing: Framing, downsampling: int) -> None:
    step = downsampling * BUCKET_GRID if framing.buckets else downsampling
    for resolution in framing.resolutions:
        if resolution % step:
            what = "with buckets " if framing.buckets else ""
            raise ValueError(f"resolution is {resolution}; {what}this VAE needs a multiple of {step}")
