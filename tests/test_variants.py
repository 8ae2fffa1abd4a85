"""A variant that is not there, and weights that are there as a variant alone: said before anything is fetched."""

import pytest
from helpers.hub import SDXL
from helpers.tiny import grounded, sdxl_pipeline

from gligen_xl import StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter.convert import read_published
from gligen_xl.hub import check_variant
from gligen_xl.pipelines.auto import load_pipeline


def one_line(error):
    return "\n" not in str(error.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same pipeline without a variant, as fp16 alone, and as fp16 and bf16."""
    root = tmp_path_factory.mktemp("variants")
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_pretrained(root / "plain")
    pipeline.save_pretrained(root / "half", variant="fp16")
    pipeline.save_pretrained(root / "two", variant="fp16", max_shard_size="100KB")
    pipeline.save_pretrained(root / "two", variant="bf16")
    return root


LOADERS = [StableDiffusionXLGLIGENPipeline.from_pretrained, load_pipeline]
CASES = [
    ("plain", "fp16", r"has no files of the variant 'fp16'; its files are of no variant, so name none"),
    ("half", "bf16", r"has no files of the variant 'bf16'; there are fp16$"),
    ("two", "int8", r"has no files of the variant 'int8'; there are bf16, fp16$"),
    ("half", None, r"holds the weights of text_encoder as fp16 only; load it with variant='fp16' \(--variant fp16\)"),
    ("two", None, r"holds the weights of text_encoder as bf16, fp16 only; load it with variant='bf16'"),
]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(("name", "variant", "says"), CASES)
def test_of_a_repository_before_anything_is_fetched(hub, folders, load, name, variant, says):
    hub.serve(folders / name)
    given = {} if variant is None else {"variant": variant}
    with pytest.raises(ValueError, match=f"^someone/gligen-xl {says}") as error:
        load("someone/gligen-xl", **given)
    assert one_line(error)
    assert hub.asked.get("files", ["model_index.json"]) == ["model_index.json"]
    if variant is not None:
        assert "files" not in hub.asked


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(("name", "variant", "says"), CASES)
def test_of_a_folder(folders, load, name, variant, says):
    given = {} if variant is None else {"variant": variant}
    with pytest.raises(ValueError, match=f"{name} {says}") as error:
        load(str(folders / name), **given)
    assert one_line(error)


def test_parts_that_are_given_are_not_asked_for(folders, hub):
    """The U-Net alone has no plain weights, and comes from elsewhere."""
    pipeline = sdxl_pipeline()
    hub.serve(folders / "half")
    given = {name: part for name, part in pipeline.components.items() if name in ("unet", "vae")}
    given |= {"text_encoder": None, "text_encoder_2": None}
    assert StableDiffusionXLGLIGENPipeline.from_pretrained("someone/gligen-xl", **given).unet is pipeline.unet


def test_a_part_that_has_the_plain_weights_alone_is_loaded_beside_a_variant(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_pretrained(tmp_path, variant="fp16")
    pipeline.vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path, variant="fp16").vae is not None
    with pytest.raises(ValueError, match="weights of text_encoder as fp16 only"):
        StableDiffusionXLGLIGENPipeline.from_pretrained(tmp_path)


def test_convert_refuses_a_variant_that_is_not_there(folders, hub, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    pipeline = grounded(sdxl_pipeline(), slots=30)
    StableDiffusionXLPipeline.save_pretrained(pipeline, tmp_path / "gated", variant="fp16")
    for source in (tmp_path / "gated", tmp_path / "gated" / "unet"):
        with pytest.raises(ValueError, match=r"no files of the variant 'bf16'; there are fp16"):
            read_published(source, variant="bf16")
        assert read_published(source, variant="fp16")[0].slots == 30
    hub.serve(tmp_path / "gated")
    with pytest.raises(ValueError, match=r"someone/x has no files of the variant 'bf16'; there are fp16"):
        read_published("someone/x", variant="bf16")
    assert "files" not in hub.asked
    assert read_published("someone/x", variant="fp16")[0].slots == 30
    for name in ("half", "two"):  # an adapter beside a pipeline
        assert read_published(folders / name, variant="fp16")[0].slots == 4


def test_an_adapter_of_a_repository(hub, tmp_path):
    pipeline = grounded(sdxl_pipeline())
    pipeline.save_gligen_adapter(tmp_path / "served", variant="fp16")
    hub.serve(tmp_path / "served")
    for given, wanted in ({}, "gligen_adapter.safetensors"), ({"variant": "bf16"}, "gligen_adapter.bf16.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"^someone/a has no {wanted}; .*fp16.*variant='fp16'"):
            sdxl_pipeline().load_gligen_adapter("someone/a", **given)
    assert "files" not in hub.asked
    assert sdxl_pipeline().load_gligen_adapter("someone/a", variant="fp16").slots == 4


def test_published_repositories():
    check_variant(SDXL, None, "sdxl")
    check_variant(SDXL, "fp16", "sdxl")
    with pytest.raises(ValueError, match="there are fp16"):
        check_variant(SDXL, "fp8", "sdxl")
    old = ["unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.bin", "vae/x.safetensors"]
    check_variant(old, None, "old")
    check_variant(old, "non_ema", "old")
    with pytest.raises(ValueError, match="there are non_ema"):
        check_variant(old, "fp16", "old")
    check_variant(["model_index.json", "README.md"], "fp16", "nothing")
