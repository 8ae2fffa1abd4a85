"""What leaves the machine, or is written for others to read, names neither its folders nor its keys."""

import json
import warnings
from dataclasses import replace

import pytest
from helpers.commands import fails, run, succeeds
from helpers.rows import METADATA, latents, row
from helpers.scenes import scenes_folder
from helpers.tiny import grounded, sdxl_pipeline, sdxl_vae
from PIL import Image

from gligen_xl import StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import save_adapter
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.data.shards import find_shards
from gligen_xl.images.draw import METADATA_KEY
from gligen_xl.pipelines.export import export_pipeline
from gligen_xl.prepare.sources import open_source
from gligen_xl.train.checkpoint import list_checkpoints
from gligen_xl.train.config import Augmentation, TrainConfig
from gligen_xl.train.loop import train
from gligen_xl.train.options import AdapterOptions, Optimization, Validation
from gligen_xl.train.record import read_run
from gligen_xl.train.report import report_page
from gligen_xl.train.resume import check_same_run


def holds(path, word):
    """Whether a file, or one of a folder, holds the word."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    assert files
    return [str(file) for file in files if word.encode() in file.read_bytes()]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-place") / "base"
    sdxl_pipeline().save_pretrained(folder)
    return folder


def test_an_adapter_names_no_folder_of_its_training(base, tmp_path):
    """Checkpoints load as adapters, and are shared as such."""
    write_shard(tmp_path / "data" / "a", latents(24, side=8), [row(1 + k % 3) for k in range(24)], METADATA)
    config = TrainConfig(
        model=str(base), data={str(tmp_path / "data"): 1.0}, out=str(tmp_path / "run"), samples=8, batch_size=4,
        checkpoint_every=4, track=[], augmentation=Augmentation(slots=3), adapter=AdapterOptions(),
        optimization=Optimization(warmup_samples=8),
    )  # fmt: skip
    finished = train(config)
    (checkpoint, *_) = list_checkpoints(tmp_path / "run")
    for folder in (finished, checkpoint):
        description = json.loads((folder / "gligen_adapter.json").read_text())
        assert description["base_model"] == "base"
        assert description["training"]["model"] == "base"
        assert description["training"]["data"] == {"data": 1.0}
        assert description["training"]["out"] == "run"
        for word in (str(tmp_path), "secret-place"):
            assert not holds(folder / "gligen_adapter.json", word)
    assert not holds(tmp_path / "run" / "report.html", str(tmp_path))
    assert holds(tmp_path / "run" / "config.json", str(tmp_path))  # which stays here, and says where things are
    train(config)  # and the run goes on by it


def test_whatever_is_said_of_an_adapter_is_saved_without_folders(tmp_path):
    about = {"note": "drawn from /home/me/pictures/a.png", "training": {"data": "/home/me/shards", "seed": 3}}
    save_adapter(grounded(sdxl_pipeline()).unet, tmp_path / "a", metadata=about)
    description = json.loads((tmp_path / "a" / "gligen_adapter.json").read_text())
    assert description["note"] == "drawn from a.png"
    assert description["training"] == {"data": "shards", "seed": 3}


def test_exported_and_saved_pipelines_name_no_folder(base, tmp_path):
    pipeline = grounded(StableDiffusionXLGLIGENPipeline.from_pretrained(base))
    pipeline.save_pretrained(tmp_path / "saved")
    export_pipeline(pipeline, tmp_path / "exported")
    for folder in ("saved", "exported"):
        assert not holds(tmp_path / folder, "secret-place")
        assert json.loads((tmp_path / folder / "model_index.json").read_text())["_name_or_path"] == "base"


def test_images_name_no_folder(capsys, base, tmp_path):
    model = tmp_path / "secret-place" / "model"
    grounded(StableDiffusionXLGLIGENPipeline.from_pretrained(base)).save_pretrained(model)
    out, layouts = tmp_path / "out", tmp_path / "layouts.json"
    name = {"id": "\u202e/../x", "prompt": "/imagine/a circle"}
    layouts.write_text(json.dumps([{"phrases": ["a\u202e\n circle"], "boxes": [[0.1, 0.1, 0.9, 0.9]], **name}]))
    words = ("--layout", layouts, "--model", model, "--adapter", model / "gligen_adapter", "--steps", 1, "--draw")
    output = succeeds(capsys, "generate", *words, "--width", 64, "--height", 64, "--out", out)
    assert "\u202e" not in output
    files = sorted(out.glob("*.png"))
    assert [file.name for file in files] == ["0000-__.._x-boxes.png", "0000-__.._x.png"]
    for file in files:
        with Image.open(file) as image:
            about = json.loads(image.info[METADATA_KEY])
        assert (about["model"], about["adapter"]) == ("model", "gligen_adapter")
        assert about["layout"]["prompt"] == "/imagine/a circle"
        assert not holds(file, "secret-place")


def test_shards_name_their_vae_and_show_finds_it(capsys, tmp_path):
    vae, shards = tmp_path / "secret-place" / "my-vae", tmp_path / "shards"
    sdxl_vae().save_pretrained(vae)
    source = scenes_folder(tmp_path / "scenes", 3, seed=1)
    succeeds(capsys, "prepare", source, "--out", shards, "--vae", vae, "--resolution", 64, "--workers", 0)
    (shard,) = find_shards(shards)
    assert shard.metadata["vae"] == "my-vae"
    assert not holds(shards / f"{shard.stem.name}.safetensors", "secret-place")
    output = succeeds(capsys, "show", shards, "--out", tmp_path / "samples.png")
    assert "3 boxes" in output or "boxes)" in output
    (shards / ".prepared" / "settings.json").unlink()  # as of shards that came from elsewhere
    assert "the VAE my-vae" in fails(capsys, "show", shards, "--out", tmp_path / "samples.png")


# Keys ---------------------------------------------------------------------------------------------------------------

SECRET = "s3://KEY:HUNTER2@bucket/shards?token=HUNTER2"


def settings(**changes):
    return TrainConfig(data=SECRET, out="runs/x", validation=Validation(data=SECRET), **changes)


def test_settings_are_written_without_keys_and_the_run_goes_on(tmp_path):
    config = settings()
    written = json.dumps(config.to_dict())
    assert "HUNTER2" not in written
    assert "s3://...@bucket/shards?token=..." in written
    assert config.data == SECRET  # what opens the storage
    check_same_run(config.to_dict(), replace(config, data="s3://KEY:OTHER@bucket/shards?token=NEW"))
    with pytest.raises(ValueError, match="batch_size"):
        check_same_run(config.to_dict(), settings(batch_size=32))


def test_a_report_of_settings_with_keys_shows_none(tmp_path):
    """Of a run that was begun when they were still written down, too."""
    document = {"config": settings().to_dict() | {"data": SECRET, "init_adapter": SECRET}, "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    page = report_page(read_run(tmp_path))
    assert "HUNTER2" not in page
    assert "KEY" not in page


def test_errors_show_no_keys_and_no_controls(capsys, tmp_path):
    says = fails(capsys, "train", "sdxl-512", "--data", "nosuch://KEY:HUNTER2@bucket/x\x1b[31m", "--out", tmp_path)
    assert "HUNTER2" not in says
    says = fails(capsys, "check", tmp_path / "\u202e\x1b[31mnone")
    assert "\\u202e\\x1b[31mnone" in says
    code, output, error = run(capsys, "\x1b[31mno-command")
    assert (code, "\x1b" in error + output) == (2, False)


# Links that leave a folder --------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """Images whose captions are links: to a file of the folder, and to somebody's notes."""
    folder = tmp_path / "pictures"
    (folder / "texts").mkdir(parents=True)
    (tmp_path / "notes").write_text("my diary")
    (folder / "texts" / "one").write_text("a circle")
    for name in ("inside", "outside", "deep"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    (folder / "inside.txt").symlink_to("texts/one")
    (folder / "outside.txt").symlink_to(tmp_path / "notes")
    (folder / "deep.txt").symlink_to("../pictures/../notes")
    return folder


def test_a_linked_text_that_leaves_the_folder_is_no_caption(linked):
    with pytest.warns(UserWarning, match=r"outside\.txt is a link to a file outside of"):
        items = [item for unit in open_source(linked) for item in unit.items()]
    assert {item.image_id: item.caption for item in items} == {"deep": "", "inside": "a circle", "outside": ""}


def test_captions_of_a_folder_are_its_own(linked, tmp_path):
    from gligen_xl.prepare.captions.table import CaptionTable

    (linked / "other.txt").write_text("a ring")
    with pytest.warns(UserWarning, match="left out"), CaptionTable.open(linked, tmp_path / "cache") as captions:
        found = {name: captions.get(name) for name in ("inside", "outside", "deep", "other")}
    assert found == {"inside": "a circle", "outside": None, "deep": None, "other": "a ring"}


def test_annotations_that_are_linked_from_elsewhere_are_refused(linked, tmp_path):
    rows = '{"file_name": "inside.png", "text": "x"}\n'
    (tmp_path / "elsewhere.jsonl").write_text(rows)
    (linked / "metadata.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is a link to a file outside of"):
        open_source(linked)
    (linked / "metadata.jsonl").unlink()
    (linked / "texts" / "rows").write_text(rows)
    (linked / "metadata.jsonl").symlink_to("texts/rows")
    assert len([item for unit in open_source(linked) for item in unit.items()]) == 1


def test_the_hubs_cache_is_made_of_links_and_is_read(tmp_path):
    """As its library keeps a data set: snapshots/REVISION/a.txt -> ../../blobs/HASH."""
    repository = tmp_path / "datasets--me--set"
    snapshot = repository / "snapshots" / "1f0c"
    for folder in (repository / "blobs", snapshot / "train"):
        folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(repository / "blobs" / "aa", format="PNG")
    (repository / "blobs" / "bb").write_text("a circle")
    (snapshot / "train" / "a.png").symlink_to("../../../blobs/aa")
    (snapshot / "train" / "a.txt").symlink_to("../../../blobs/bb")
    for folder in (snapshot, snapshot / "train"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (item,) = [item for unit in open_source(folder) for item in unit.items()]
        assert item.caption == "a circle"
