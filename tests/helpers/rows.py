"""Rows and latents of shards, as training reads them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gligen_xl.data.shards import Row, latents_file, table_files

METADATA = {"resolution": "64", "vae": "tiny", "scaling_factor": "0.18215"}


def row(k, **changes):
    settings = {
        "image_id": f"picture-{k}", "caption": f"grass with {k} rings", "boxes": [(0.1, 0.2, 0.3, 0.4)] * k,
        "scores": [0.5] * k, "phrases": ["a ring"] * k, "original_height": 480, "original_width": 640, "crop_left": k,
    }  # fmt: skip
    return Row(**(settings | changes))


def latents(count, side=4):
    return np.random.default_rng(0).normal(size=(count, 4, side, side)).astype(np.float16)


def read_arrow(path):
    """The table of a shard, as pyarrow alone reads it."""
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def write_arrow(path, table, **options):
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


def to_version_1(stem):
    """Makes of a shard one of version 1, whose table is a parquet file."""
    arrow, parquet = table_files(stem)
    pq.write_table(read_arrow(arrow), parquet, row_group_size=1024)
    arrow.unlink()
    file = latents_file(stem)
    content = file.read_bytes()
    assert content.count(b'"version": "2"') == 1
    file.write_bytes(content.replace(b'"version": "2"', b'"version": "1"'))
