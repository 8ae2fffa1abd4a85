"""Other projects' weights in: every published form gives the adapter that it holds, and bad files are refused."""

import io
import json
import pickle
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.published import grounded_unet, original_name, same
from helpers.tiny import grounded, sd15_unet, sd_pipeline, sdxl_pipeline, sdxl_unet
from safetensors.torch import save_file

from gligen_xl.adapter import AdapterConfig, adapter_state_dict, load_adapter, write_adapter
from gligen_xl.adapter.convert import diffusers_name, read_published


@pytest.mark.parametrize("make", [sd15_unet, sdxl_unet])
def test_names_of_the_original_code_are_those_of_the_same_blocks(make):
    state = adapter_state_dict(grounded_unet(make))
    names = [original_name(name) for name in state]
    assert len(set(names)) == len(state)
    assert names != list(state)
    assert [diffusers_name(name) for name in names] == list(state)
    assert [diffusers_name(f"model.diffusion_model.{name}") for name in names] == list(state)


def test_published_names_are_known():
    """SD 1.4, as GLIGEN numbers it: three blocks a level, the convolution first."""
    pairs = {
        "input_blocks.1.1": "down_blocks.0.attentions.0",
        "input_blocks.8.1": "down_blocks.2.attentions.1",
        "middle_block.1": "mid_block.attentions.0",
        "output_blocks.3.1": "up_blocks.1.attentions.0",
        "output_blocks.11.1": "up_blocks.3.attentions.2",
    }
    for original, ours in pairs.items():
        ending = "transformer_blocks.0.fuser.alpha_attn"
        assert diffusers_name(f"{original}.{ending}") == f"{ours}.{ending}"


def test_a_gated_pipeline_folder_sharded_and_with_a_variant(tmp_path):
    pipeline = grounded(sdxl_pipeline(), slots=30)
    expected = adapter_state_dict(pipeline.unet)
    StableDiffusionXLPipeline.save_pretrained(pipeline, tmp_path / "whole", max_shard_size="60KB")
    assert len(list((tmp_path / "whole" / "unet").glob("*.safetensors"))) > 1
    config, state, about = read_published(tmp_path / "whole")
    same(state, expected)
    assert (config.cross_attention_dim, config.phrase_dim, config.slots, config.inpaint) == (40, 40, 30, False)
    assert about["converted_from"] == "whole"
    same(read_published(tmp_path / "whole" / "unet")[1], expected)
    StableDiffusionXLPipeline.save_pretrained(pipeline, tmp_path / "half", variant="fp16", max_shard_size="60KB")
    same(read_published(tmp_path / "half", variant="fp16")[1], expected)
    same(read_published(tmp_path / "half")[1], expected)  # there is no other


def test_pickled_weights_of_diffusers_folders(tmp_path):
    pipeline = grounded(sd_pipeline())
    StableDiffusionPipeline.save_pretrained(pipeline, tmp_path, safe_serialization=False)
    assert list((tmp_path / "unet").glob("*.bin"))
    same(read_published(tmp_path)[1], adapter_state_dict(pipeline.unet))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("ending", ["safetensors", "bin", "nested.bin"])
def test_single_files_of_the_original_code(tmp_path, prefix, ending):
    unet = grounded_unet()
    expected = adapter_state_dict(unet)
    whole = {prefix + original_name(name): value.detach().clone() for name, value in unet.state_dict().items()}
    whole["first_stage_model.encoder.conv_in.weight"] = torch.zeros(3)
    path = tmp_path / f"gligen.{ending}"
    if ending == "safetensors":
        save_file(whole, path)
    else:
        extra = {"autoencoder": {"conv_in.weight": torch.zeros(2)}, "iters": 7}
        torch.save({"model": whole, **extra} if "nested" in ending else whole, path)
    config, state, about = read_published(path)
    same(state, expected)
    assert not config.inpaint
    assert about["converted_from"] == path.name
    write_adapter(tmp_path / "adapter", config, state, about)
    other = sd15_unet(layers_per_block=2)
    load_adapter(other, tmp_path / "adapter")
    same(adapter_state_dict(other), expected)


def test_the_adapter_alone_in_the_original_names(tmp_path):
    expected = adapter_state_dict(grounded_unet())
    save_file({original_name(name): value for name, value in expected.items()}, tmp_path / "textbox_pruned.safetensors")
    same(read_published(tmp_path / "textbox_pruned.safetensors")[1], expected)


def test_an_inpainting_model_brings_its_first_convolution(tmp_path):
    unet = grounded_unet(inpaint=True)
    expected = adapter_state_dict(unet)
    assert expected["conv_in.weight"].shape[1] == 9
    save_file({original_name(name): value for name, value in expected.items()}, tmp_path / "inpainting.safetensors")
    config, state, _ = read_published(tmp_path / "inpainting.safetensors")
    assert config.inpaint
    same(state, expected)


def test_adapter_folders_pass_through_and_may_change_their_slots(tmp_path):
    unet = grounded_unet(slots=7)
    config = AdapterConfig(cross_attention_dim=24, phrase_dim=24, slots=7)
    write_adapter(tmp_path, config, adapter_state_dict(unet), {"base": "mine"})
    assert read_published(tmp_path)[0] == config
    config, state, about = read_published(tmp_path, slots=9)
    assert (config.slots, about) == (9, {"base": "mine"})
    same(state, adapter_state_dict(unet))


def test_nothing_of_a_pickle_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"input_blocks.1.1.fuser": Evil()}, tmp_path / "zip.bin")
    for name, says in (("evil.bin", "asks not only"), ("zip.bin", "asks for .*open, and not only")):
        with pytest.raises(ValueError, match=f"{name} .*{says} for tensors; nothing of it ran"):
            read_published(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_settings_of_gligens_trainer_are_read_as_nothing(tmp_path, monkeypatch):
    """It saved objects of omegaconf beside the weights; no such library is needed, and none is asked."""
    made = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self, content):
            self.content = content

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    made.DictConfig = DictConfig
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", made)
    state = adapter_state_dict(grounded_unet())
    whole = {original_name(name): value.clone() for name, value in state.items()}
    torch.save({"model": whole, "config_dict": {"_content": DictConfig({"a": 1})}}, tmp_path / "gligen.bin")
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    same(read_published(tmp_path / "gligen.bin")[1], state)


def test_a_pipeline_folder_of_ours_gives_the_adapter_beside_it(tmp_path):
    pipeline = grounded(sdxl_pipeline(), slots=5)
    pipeline.save_pretrained(tmp_path)
    config, state, _ = read_published(tmp_path)
    same(state, adapter_state_dict(pipeline.unet))
    assert config.slots == 5
    with pytest.raises(ValueError, match="slots is 0"):
        read_published(tmp_path, slots=0)


def test_files_that_hold_the_same_are_not_mixed(tmp_path):
    state = adapter_state_dict(grounded_unet())
    for name in ("first", "second"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="in more than one file"):
        read_published(tmp_path)


def test_what_holds_no_adapter_is_refused_by_name(tmp_path):
    state = adapter_state_dict(grounded_unet())

    def says(tensors, words):
        save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=words):
            read_published(tmp_path / "x.safetensors")

    says({"model.norm.weight": torch.zeros(3)}, "holds no GLIGEN adapter: it has no fusers")
    says({name: value for name, value in state.items() if ".fuser." in name}, "no position net")
    one = (
        "mid_block.attentions.0.transformer_blocks.0.fuser.norm1.weight" if any("mid_block" in n for n in state) else ""
    )
    one = one or next(name for name in state if name.endswith("fuser.norm1.weight"))
    says({name: value for name, value in state.items() if name != one}, f"lacks {one}")
    says(state | {"position_net.null_text_feature": torch.zeros(3)}, "another kind of grounding")
    says(state | {one: torch.full_like(state[one], float("nan"))}, f"{one} .*not finite")
    twice = {f"ema.{name}": value for name, value in state.items()}
    says(state | twice, "twice, the second time as")


def test_damaged_and_missing_files(tmp_path):
    state = adapter_state_dict(grounded_unet())
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    (tmp_path / "half.bin").write_bytes(buffer.getvalue()[:5000])
    (tmp_path / "empty.bin").write_bytes(b"")
    for name in ("half.safetensors", "half.bin", "empty.bin"):
        with pytest.raises(ValueError, match=f"{name} .*damaged"):
            read_published(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        read_published(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        read_published(tmp_path / "nowhere")


def test_of_a_repository_only_the_unet_is_fetched(tmp_path, monkeypatch):
    pipeline = grounded(sdxl_pipeline(), slots=30)
    StableDiffusionXLPipeline.save_pretrained(pipeline, tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit\n")
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    asked = {}

    def fetch(repo, allow_patterns, **options):
        asked.update(repo=repo, files=allow_patterns, **options)
        return str(tmp_path)

    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr("gligen_xl.hub.HfApi.model_info", lambda *_, **__: listing)
    monkeypatch.setattr("gligen_xl.hub.snapshot_download", fetch)
    _, state, about = read_published("someone/gligen-xl", revision="main")
    same(state, adapter_state_dict(pipeline.unet))
    assert about["converted_from"] == "someone/gligen-xl"
    assert asked["revision"] == "main"
    assert not [name for name in asked["files"] if name.endswith(".py") or name.startswith("vae/")]
    assert json.loads((tmp_path / "model_index.json").read_text())
