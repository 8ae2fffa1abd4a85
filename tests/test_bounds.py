"""What comes from outside is refused where it is absurdly large, before anything is made of it."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gligen_xl.adapter import AdapterConfig
from gligen_xl.adapter.convert import read_published
from gligen_xl.adapter.io import CONFIG_NAME, FORMAT, WEIGHTS_NAME, read_adapter
from gligen_xl.cli.main import main
from gligen_xl.contrib.sa1b import plain_pickle
from gligen_xl.contrib.sa1b.published import read_boxes
from gligen_xl.data.shards import read_header
from gligen_xl.data.table import TABLE, read_table
from gligen_xl.hub import local_folder
from gligen_xl.layout import Layout, read_layouts
from gligen_xl.limits import MAX_BOXES, MAX_SIDE, MAX_SLOTS
from gligen_xl.pipelines.auto import load_pipeline
from gligen_xl.prepare.settings import Framing, Settings
from gligen_xl.recipes import read_settings
from gligen_xl.toyworld import model_folder
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.options import Optimization, Validation
from gligen_xl.yaml_io import read_yaml

MIB = 2**20


def peak_of(code, *words):
    """Bytes that this code takes beyond its imports, and what it printed. It has `act()` to do."""
    measured = f"""
import resource, sys
{code}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    act(*sys.argv[1:])
except ValueError as error:
    print(str(error)[:1000])
print(peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", measured, *map(str, words)], capture_output=True, text=True, check=True)
    *said, peak = ran.stdout.splitlines()
    return int(peak) * 1024, "\n".join(said)


# Files that come to more than they are ------------------------------------------------------------------------------


def table_file(path, rows):
    """A table of boxes as published, an object array; objects that are the same stand in it once."""
    array = np.empty((len(rows), len(rows[0])), object)
    for k, row in enumerate(rows):
        array[k] = row
    np.save(path, array, allow_pickle=True)
    return path


def row(index, caption="a cat", phrases=("a cat",)):
    return [index, caption, [[0.5, 0.5, 0.2, 0.2]] * len(phrases), [0.9] * len(phrases), list(phrases)]


def test_one_text_named_over_and_over(tmp_path):
    text = "word " * 100_000
    captions = table_file(tmp_path / "captions.npy", [row(k, caption=text) for k in range(2000)])
    phrases = table_file(tmp_path / "phrases.npy", [row(k, phrases=[text] * 20) for k in range(200)])
    words = np.array([text])
    arrays = table_file(tmp_path / "arrays.npy", [[*row(k)[:4], words] for k in range(2000)])
    for path in (captions, phrases, arrays):
        assert path.stat().st_size < 3 * MIB
        peak, said = peak_of("from gligen_xl.contrib.sa1b.published import read_boxes as act", path)
        assert str(path) in said
        assert "over and over" in said
        assert peak < 200 * MIB


def test_an_import_of_such_a_table_names_it_and_takes_little(tmp_path):
    for name in ("latents", "boxes"):
        (tmp_path / name).mkdir()
    content = {"indices": np.arange(2000), "latents": np.zeros((2000, 4, 4, 4), np.float16)}
    np.save(tmp_path / "latents" / "sa_000000.npy", np.array(content, object), allow_pickle=True)
    text = "c" * 200_000
    table = table_file(tmp_path / "boxes" / "sa_000000.npy", [row(k, caption=text) for k in range(2000)])
    code = """
from gligen_xl.contrib.sa1b.convert import import_published
def act(*words):
    print(import_published(*words))
"""
    peak, said = peak_of(code, tmp_path / "latents", tmp_path / "boxes", tmp_path / "out")
    assert "failed: sa_000000" in said
    assert str(table) in said
    assert peak < 200 * MIB


def test_honest_tables_with_the_same_phrases_are_read(tmp_path):
    words = [f"a thing of kind {k} in the image" for k in range(30)]
    path = table_file(tmp_path / "a.npy", [row(k, "an image of things " * 10, words) for k in range(2000)])
    assert len(read_boxes(path)) == 2000


def test_lists_within_lists_and_remembered_values(tmp_path, monkeypatch):
    header = np.lib.format.MAGIC_PREFIX + b"\x01\x00"
    text = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    header += len(text).to_bytes(2, "little") + text
    monkeypatch.setattr(plain_pickle, "OBJECTS", 50_000)
    for name, body in (
        ("lists", b"\x80\x04" + b"]" * 60_000 + b"."),
        ("remembered", b"\x80\x04N" + b"\x94" * 60_000 + b"."),
        ("tuples", b"\x80\x04)" + b"\x85" * 60_000 + b"."),
        ("marks", b"\x80\x04" + b"(" * 60_000 + b"."),
    ):
        path = tmp_path / f"{name}.npy"
        path.write_bytes(header + body)
        with pytest.raises(ValueError, match=rf"{name}\.npy is damaged.* more than 50000 lists"):
            read_boxes(path)
    doubled = [0] * 1000
    for _ in range(12):
        doubled = [doubled, doubled]
    path = table_file(tmp_path / "doubled.npy", [[*row(0)[:2], doubled, [], []]])
    with pytest.raises(ValueError, match=r"doubled\.npy.* more than its bytes can hold"):
        read_boxes(path)


def columns(count):
    return {
        "image_id": [str(k) for k in range(count)],
        "caption": ["a"] * count,
        "boxes": [[[0.1, 0.1, 0.5, 0.5]]] * count,
        "scores": [[1.0]] * count,
        "phrases": [["a cat"]] * count,
        **{name: [64] * count for name in ("original_height", "original_width", "crop_top", "crop_left")},
    }


@pytest.mark.parametrize(
    "changed",
    [
        {"caption": lambda: pa.array(["c" * 200_000]).take(pa.array([0] * 3000))},
        {"phrases": lambda: pa.array([["p" * 100_000] * 8]).take(pa.array([0] * 500)), "rows": 500},
        {
            "scores": lambda: pa.ListArray.from_arrays([0, 90_000_000], pa.array(np.zeros(90_000_000, np.float32))),
            "rows": 1,
        },
    ],
    ids=["captions", "phrases", "numbers"],
)
def test_a_parquet_that_unpacks_to_gigabytes(tmp_path, changed):
    (name, make), *rest = changed.items()
    count = rest[0][1] if rest else 3000
    values = columns(count)
    arrays = [
        make() if name == column else pa.array(values[column], kind)
        for column, kind in zip(TABLE.names, TABLE.types, strict=True)
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(arrays, names=TABLE.names), path, compression="zstd")
    assert path.stat().st_size < 2 * MIB
    code = "from pathlib import Path\nfrom gligen_xl.data.table import read_table\ndef act(p): read_table(Path(p))"
    peak, said = peak_of(code, path)
    assert f"{path} unpacks to" in said
    assert peak < 700 * MIB


def test_a_large_honest_parquet_is_read(tmp_path):
    values = columns(20_000) | {"caption": ["a long caption of an image " * 20] * 20_000}
    pq.write_table(pa.table(values, schema=TABLE), tmp_path / "a.parquet", row_group_size=3000)
    assert len(read_table(tmp_path / "a.parquet")) == 20_000


def large_header(path):
    """A file of safetensors whose header is 30 MB of tensors without contents."""
    entries = {f"tensor.{k:08d}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for k in range(250_000)}
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def test_headers_of_tens_of_megabytes(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / CONFIG_NAME).write_text(
        json.dumps({"format": FORMAT, "version": 1, "config": {"cross_attention_dim": 8, "phrase_dim": 8}})
    )
    one = large_header(tmp_path / "one.safetensors")
    for path, act in (
        (adapter / WEIGHTS_NAME, lambda path: read_adapter(path.parent)),
        (one, read_published),
        (one, read_header),
        (one, load_pipeline),
    ):
        if path is not one:
            shutil.copy(one, path)
        with pytest.raises(ValueError, match=f"{path} has a header of"):
            act(path)
    model = tmp_path / "model" / "unet"
    model.mkdir(parents=True)
    shutil.copy(one, model / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="has a header of"):
        local_folder(tmp_path / "model", "pipeline", [])


def test_tensors_beyond_their_file(tmp_path):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"position_net.x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        read_published(path)


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    torch.save({"position_net.a": torch.zeros(30_000_000)}, tmp_path / "whole.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "whole.ckpt") as whole,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    assert (tmp_path / "bomb.ckpt").stat().st_size < MIB
    with pytest.raises(ValueError, match=r"bomb\.ckpt of \d+ bytes unpacks to 12\d{7}"):
        read_published(tmp_path / "bomb.ckpt")
    with pytest.raises(ValueError, match="holds no GLIGEN adapter"):
        read_published(tmp_path / "whole.ckpt")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join(['*' + chr(97 + k)] * 9)}]\n" for k in range(9)
)


def test_yaml_that_laughs(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(LAUGHS)
    peak, said = peak_of("from gligen_xl.recipes import read_settings as act", path)
    assert f"{path} stands for more than" in said
    assert peak < 50 * MIB
    path.write_text(LAUGHS.replace("[", "{").replace("]", "}").replace("x, " * 8 + "x", "x: 1"))
    with pytest.raises(ValueError, match=str(path)):
        read_settings(path)
    path.write_text("a: &a [*a]\n")
    with pytest.raises(ValueError, match="holds itself"):
        read_yaml(path)
    path.write_text("[" * 5000)
    with pytest.raises(ValueError, match=str(path)):
        read_yaml(path)
    path.write_text("a: " + "[" * 90 + "]" * 90)
    with pytest.raises(ValueError, match="values deep"):
        read_yaml(path)
    path.write_text("x: 1 # " + "x" * 5 * MIB)
    with pytest.raises(ValueError, match="bytes; expected at most"):
        read_yaml(path)
    path.write_text("first: &same {batch_size: 8}\nsecond: *same\n")
    assert read_yaml(path) == {"first": {"batch_size": 8}, "second": {"batch_size": 8}}


# Settings -----------------------------------------------------------------------------------------------------------


def test_adapters_of_absurd_sizes():
    for name, value in (
        ("slots", 10**7),
        ("slots", MAX_SLOTS + 1),
        ("phrase_dim", 10**9),
        ("cross_attention_dim", 2**40),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected at most"):
            AdapterConfig(**({"cross_attention_dim": 8, "phrase_dim": 8} | {name: value}))
    assert AdapterConfig(cross_attention_dim=2048, phrase_dim=2048, slots=MAX_SLOTS).slots == MAX_SLOTS


def test_layouts_of_absurd_sizes(tmp_path):
    box = [0.1, 0.1, 0.5, 0.5]
    for values, message in (
        ({"width": 16384, "height": 16384}, f"width is 16384; expected 1 to {MAX_SIDE}"),
        ({"height": 10**9}, "height is 1000000000; expected 1 to"),
        ({"prompt": "a" * MIB}, f"prompt has {MIB} characters"),
        ({"negative_prompt": "a" * MIB}, f"negative_prompt has {MIB} characters"),
        ({"id": "a" * MIB}, f"id has {MIB} characters"),
        ({"phrases": ["a" * MIB], "boxes": [box]}, r"phrases\[0\] has \d+ characters"),
        ({"phrases": ["a"] * 10**6, "boxes": [box] * 10**6}, f"phrases are 1000000; expected at most {MAX_BOXES}"),
        ({"phrases": "a" * MIB}, "expected a list of strings"),
        ({"prompt": ["a" * MIB]}, "prompt is"),
        ({"phrases": ["a"], "boxes": [[0.1] * 10**6]}, "of 1000000 items"),
        ({"width": 10**4000}, "width is"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            Layout(**values)
        assert len(str(caught.value)) < 5000
    with pytest.raises(ValueError, match="boxes are 1000000"):
        Layout(phrases=["a"], boxes=[box] * 10**6)
    assert Layout(width=MAX_SIDE, phrases=["a"] * 500, boxes=[box] * 500).width == MAX_SIDE
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(300 * MIB)
    with pytest.raises(ValueError, match=r"large\.json has \d+ bytes"):
        read_layouts(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "1000000000"], "--count is 1000000000"),
        (["--steps", "1000000000"], "--steps is 1000000000; expected 1 to"),
        (["--batch_size", "1000000000"], "--batch_size is 1000000000; expected 1 to"),
        (["--width", "16384", "--height", "16384"], "width is 16384; expected"),
        (["--phrase", "a" * 50_000, "--box", "0 0 1 1"], "phrases[0] has 50000 characters"),
    ],
)
def test_generate_refuses_absurd_numbers(capsys, tmp_path, words, message):
    with pytest.raises(SystemExit) as caught:
        sys.exit(main(["generate", "--prompt", "a", "--out", str(tmp_path / "out"), *words]))
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 10**9},
        {"micro_batch": 10**9, "batch_size": 10**9},
        {"workers": 10**5},
        {"resolution": 1_000_000},
        {"samples": 10**30},
        {"data": "shapes:" + "9" * 30},
    ],
)
def test_runs_of_absurd_sizes(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{value}"):
        TrainConfig(**({"data": "shards", "out": "run"} | settings))
    assert name
    with pytest.raises(ValueError, match=r"validation\.steps is 1000000000; expected 1 to"):
        Validation(data="shards", steps=10**9)
    with pytest.raises(ValueError, match=r"validation\.pictures"):
        Validation(data="shards", pictures=10**9)
    assert Optimization(warmup_samples=10**9).warmup_samples == 10**9
    with pytest.raises(ValueError, match="resolutions are"):
        Settings(framing=Framing(resolutions=(10**6,)))


@pytest.fixture
def model(tmp_path):
    """The settings of a pipeline's parts, without their weights."""
    for file in model_folder().glob("*/config.json"):
        (tmp_path / file.parent.name).mkdir()
        (tmp_path / file.parent.name / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("unet", "layers_per_block", 10**6),
        ("unet", "layers_per_block", [2, 10**6]),
        ("unet", "transformer_layers_per_block", [[1, 10**9], 1]),
        ("unet", "block_out_channels", [32, 10**9]),
        ("unet", "block_out_channels", [32] * 1000),
        ("unet", "cross_attention_dim", 10**12),
        ("unet", "sample_size", 10**9),
        ("unet", "layers_per_block", 1e18),
        ("vae", "layers_per_block", 10**6),
        ("vae", "latent_channels", 10**9),
        ("text_encoder", "num_hidden_layers", 10**6),
        ("text_encoder", "vocab_size", 10**9),
        ("text_encoder", "hidden_size", 10**9),
        ("text_encoder_2", "max_position_embeddings", 10**9),
        ("text_encoder_2", "projection_dim", 10**9),
    ],
)
def test_models_of_absurd_sizes(model, part, name, value):
    assert local_folder(model, "pipeline", []) == model
    file = model / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"{part}/config.json: {name} (is|has) .*; expected at most"):
        local_folder(model, "pipeline", [])


def test_a_model_whose_sizes_multiply(model):
    file = model / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 2**21, "hidden_size": 2**15}))
    with pytest.raises(ValueError, match="vocab_size is 2097152, hidden_size 32768"):
        local_folder(model, "pipeline", [])


def test_settings_of_many_megabytes(model):
    (model / "unet" / "config.json").write_text("[" + "[]," * 2_000_000 + "[]]")
    with pytest.raises(ValueError, match=r"unet/config\.json has 6000004 bytes"):
        local_folder(model, "pipeline", [])
