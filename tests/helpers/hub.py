"""A folder that stands for the Hub, and checkpoints as they are published there."""

import fnmatch
import re
import shutil
from types import SimpleNamespace

import pytest
import torch


def listing(text):
    return text.split()


SDXL = listing("""
.gitattributes 01.png LICENSE.md README.md model_index.json sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors
sd_xl_offset_example-lora_1.0.safetensors pipeline.py
scheduler/scheduler_config.json
text_encoder/config.json text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors text_encoder/model.onnx
text_encoder/model.safetensors text_encoder/openvino_model.bin text_encoder/openvino_model.xml
text_encoder_2/config.json text_encoder_2/flax_model.msgpack text_encoder_2/model.fp16.safetensors
text_encoder_2/model.onnx text_encoder_2/model.onnx_data text_encoder_2/model.safetensors
text_encoder_2/openvino_model.bin text_encoder_2/openvino_model.xml
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
unet/config.json unet/diffusion_flax_model.msgpack unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.safetensors unet/model.onnx unet/model.onnx_data unet/openvino_model.bin
vae/config.json vae/diffusion_flax_model.msgpack vae/diffusion_pytorch_model.fp16.safetensors
vae/diffusion_pytorch_model.safetensors
vae_decoder/config.json vae_decoder/model.onnx vae_decoder/openvino_model.bin vae_decoder/openvino_model.xml
""")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub.serve(folder)` makes a folder the repository; `hub.asked` is what was asked of it."""

    class Hub:
        def __init__(self):
            self.asked = {}

        def serve(self, folder):
            def list_files(api, repo, *, revision=None):
                self.asked |= {"listed": repo, "listed_revision": revision, "listed_token": api.token}
                names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
                return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

            def snapshot(repo, *, allow_patterns, **options):
                self.asked |= {"repo": repo, "files": allow_patterns, **options}
                copy = tmp_path / "snapshot"
                for path in folder.rglob("*"):
                    name = path.relative_to(folder).as_posix()
                    wanted = allow_patterns is None or any(fnmatch.fnmatch(name, it) for it in allow_patterns)
                    if path.is_file() and wanted:
                        (copy / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy(path, copy / name)
                return str(copy)

            monkeypatch.setattr("gligen_xl.hub.HfApi.model_info", list_files)
            monkeypatch.setattr("gligen_xl.hub.snapshot_download", snapshot)

    return Hub()


UNET_NAMES = [
    (r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"), (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
]  # fmt: skip


RESNET_NAMES = [
    ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"), ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
]  # fmt: skip


VAE_NAMES = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_(q|k|v)", r"attn_1.\1"), (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
]  # fmt: skip


CLIP_NAMES = [
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"), (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
]  # fmt: skip


def renamed(name, rules):
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def unet_name(name, layers):
    """The original name of a tensor of a U-Net with `layers` resnets a level on the way down, one more on that up."""
    name = renamed(name, UNET_NAMES)
    if match := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name):
        way, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        a_level = layers + 1
        block = {"downsamplers": layers, "upsamplers": layers}.get(kind, layer) + level * a_level + (way == "down")
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "2"}[kind]
        rest = rest.replace("conv.", "op.", 1) if kind == "downsamplers" else rest
        name = f"{'input' if way == 'down' else 'output'}_blocks.{block}.{place}.{rest}"
    if re.match(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", name):
        name = renamed(name, RESNET_NAMES)
    return f"model.diffusion_model.{name}"


def vae_name(name, levels):
    name = re.sub(
        r"up_blocks\.(\d)\.(resnets|upsamplers\.0)",
        lambda found: f"up.{levels - 1 - int(found[1])}.{'block' if found[2] == 'resnets' else 'upsample'}",
        name,
    )
    return f"first_stage_model.{renamed(name, VAE_NAMES)}"


def original_checkpoint(pipeline, layers=1):
    """An SDXL pipeline's tensors in the names of the original code, as its one-file checkpoints hold them."""
    tensors = {unet_name(name, layers): value for name, value in pipeline.unet.state_dict().items()}
    tensors |= {vae_name(name, 2): value for name, value in pipeline.vae.state_dict().items()}
    for name, value in pipeline.text_encoder.state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    second = pipeline.text_encoder_2.state_dict()
    prefix = "conditioner.embedders.1.model."
    for name, value in second.items():
        if name == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = value.T
        elif match := re.match(r"(.*)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [second[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] for part in "qkv"]
            tensors[f"{prefix}{renamed(match[1], CLIP_NAMES)}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            tensors[prefix + renamed(name, CLIP_NAMES)] = value
    return {name: value.contiguous().clone() for name, value in tensors.items()}
