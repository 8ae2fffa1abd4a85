"""Ways to run the U-Net that grounding must survive: half precision, offloading, quantised bases, layerwise casting,
compiling. In each, boxes act, and without them the image is that of diffusers' own pipeline run the same way."""

import itertools

import bitsandbytes
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import StableDiffusionXLPipeline, TorchAoConfig, UNet2DConditionModel
from diffusers.quantizers import PipelineQuantizationConfig
from helpers.tiny import grounded, sdxl_pipeline, sdxl_unet
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from gligen_xl import StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import adapter_parameters, adapter_state_dict, adopt_gated, is_adapter_key, is_gated

LAYOUT = {
    "gligen_phrases": ["a red circle", "a blue star"],
    "gligen_boxes": [[0.1, 0.1, 0.5, 0.5], [0.5, 0.4, 0.9, 1.0]],
    "gligen_scheduled_sampling_beta": 0.7,
}
MOVED = {**LAYOUT, "gligen_boxes": [[0.5, 0.1, 0.9, 0.5], [0.0, 0.4, 0.4, 1.0]]}
CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn


def plain_pipeline():
    """diffusers' own pipeline over the same weights; nothing of ours is in it."""
    return quiet(StableDiffusionXLPipeline(**sdxl_pipeline().components, add_watermarker=False))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **kwargs):
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt", "width": 16, "height": 16}
    return pipeline("an image of grass", generator=torch.Generator().manual_seed(3), **(settings | kwargs)).images


def differ(a, b):
    return float((a - b).abs().max()) > 1e-3


def check_grounded(pipeline, plain):
    """Without boxes the plain pipeline's image, bit for bit; with them another, which depends on where they are."""
    without = draw(pipeline)
    assert torch.equal(without, draw(plain))
    image = draw(pipeline, **LAYOUT)
    assert image.isfinite().all()
    assert differ(image, without)
    assert differ(image, draw(pipeline, **MOVED))
    return image


@pytest.fixture(scope="module")
def reference():
    """The image with boxes, in float32 on a U-Net that nothing was done to."""
    return draw(grounded(sdxl_pipeline()), **LAYOUT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines on disk: plain with the adapter beside it, and with a gated U-Net as diffusers saves one."""
    root = tmp_path_factory.mktemp("pipelines")
    pipeline = grounded(sdxl_pipeline(), slots=30)
    pipeline.save_pretrained(root / "beside")
    StableDiffusionXLPipeline.save_pretrained(pipeline, root / "gated")
    pipeline.unload_gligen_adapter()
    pipeline.save_pretrained(root / "plain")
    pipeline.load_gligen_adapter(root / "beside" / "gligen_adapter")
    pipeline.save_gligen_adapter(root / "adapter")
    return root


# Half precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, reference):
    pipeline = grounded(sdxl_pipeline()).to(dtype)
    image = check_grounded(pipeline, plain_pipeline().to(dtype))
    assert image.dtype == dtype
    torch.testing.assert_close(image.float(), reference, atol=0.05, rtol=0)
    pipeline.set_gligen_adapter_scale(0)
    assert torch.equal(draw(pipeline, **LAYOUT), draw(pipeline))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_takes_the_type_of_the_unet_it_is_loaded_onto(dtype, tmp_path):
    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path)
    pipeline = sdxl_pipeline().to(dtype)
    pipeline.load_gligen_adapter(tmp_path)
    assert {value.dtype for value in adapter_parameters(pipeline.unet).values()} == {dtype}
    assert torch.equal(draw(pipeline, **LAYOUT), draw(grounded(sdxl_pipeline()).to(dtype), **LAYOUT))


# Offloading ---------------------------------------------------------------------------------------------------------


def test_model_offload(reference, tmp_path):
    """Without a GPU: diffusers' own call with the CPU in its place. The hooks are the same, the moves are none."""
    pipeline, plain = grounded(sdxl_pipeline()), plain_pipeline()
    pipeline.save_gligen_adapter(tmp_path)
    for each in (pipeline, plain):
        each.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipeline.unet, "_hf_hook")
    assert torch.equal(check_grounded(pipeline, plain), reference)
    later = sdxl_pipeline()
    later.enable_model_cpu_offload(device="cpu")
    later.load_gligen_adapter(tmp_path)
    assert torch.equal(draw(later, **LAYOUT), reference)
    pipeline.unload_gligen_adapter()
    assert torch.equal(draw(pipeline), draw(plain))


def test_model_offload_by_the_hooks_that_hand_on_to_each_other(reference):
    """accelerate's `cpu_offload_with_hook`, which diffusers' model offload is made of, with the CPU as the device."""
    pipeline, hook = grounded(sdxl_pipeline()), None
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        module, hook = cpu_offload_with_hook(getattr(pipeline, name), CPU, prev_module_hook=hook)
        setattr(pipeline, name, module)
    assert torch.equal(draw(pipeline, **LAYOUT), reference)


def sequentially_offloaded(pipeline):
    for name in ("unet", "vae"):
        module = getattr(pipeline, name)
        cpu_offload(module, CPU, offload_buffers=len(module._parameters) > 0)
    return pipeline


def test_sequential_offload(reference):
    """Without a GPU: accelerate's `cpu_offload` as diffusers' `enable_sequential_cpu_offload` calls it, with the CPU as
    the device. Not on the text encoders: accelerate fails at their embeddings when it offloads from CPU to CPU."""
    pipeline, plain = (sequentially_offloaded(each) for each in (grounded(sdxl_pipeline()), plain_pipeline()))
    assert pipeline.unet.device.type == "meta"
    assert all(value.is_meta for value in adapter_parameters(pipeline.unet).values())
    assert torch.equal(check_grounded(pipeline, plain), reference)
    whole = grounded(sdxl_pipeline())
    fading = LAYOUT | {"gligen_scheduled_sampling_beta": (0.4, 0.4, 0.2)}
    assert torch.equal(draw(pipeline, **fading), draw(whole, **fading))
    for each in (pipeline, whole):
        each.set_gligen_adapter_scale(0.5)
    assert torch.equal(draw(pipeline, **LAYOUT), draw(whole, **LAYOUT))


def test_adapters_are_neither_loaded_nor_saved_while_their_weights_are_away(tmp_path):
    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path / "first")
    pipeline = sequentially_offloaded(grounded(sdxl_pipeline()))
    image = draw(pipeline, **LAYOUT)
    with pytest.raises(ValueError, match="load the adapter before enabling it"):
        pipeline.load_gligen_adapter(tmp_path / "first")
    with pytest.raises(ValueError, match="save the adapter before enabling it"):
        pipeline.save_gligen_adapter(tmp_path / "second")
    assert torch.equal(draw(pipeline, **LAYOUT), image)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind, reference, tmp_path):
    """Without a GPU: onto the CPU, by the same hooks and without streams."""
    settings = {"onload_device": CPU, "offload_type": kind, "num_blocks_per_group": 1}
    pipeline, plain = grounded(sdxl_pipeline()), plain_pipeline()
    for each in (pipeline, plain):
        each.enable_group_offload(**settings)
    assert torch.equal(check_grounded(pipeline, plain), reference)
    pipeline.set_gligen_adapter_scale(0)
    assert torch.equal(draw(pipeline, **LAYOUT), draw(plain))
    pipeline.set_gligen_adapter_scale(1)
    pipeline.save_gligen_adapter(tmp_path)
    pipeline.unload_gligen_adapter()
    assert torch.equal(draw(pipeline), draw(plain))


def test_group_offload_learns_of_an_adapter_that_is_loaded_later(reference, tmp_path):
    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path)
    pipeline = sdxl_pipeline()
    pipeline.unet.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    pipeline.load_gligen_adapter(tmp_path)
    leaves = [
        module
        for name, module in pipeline.unet.named_modules()
        if is_adapter_key(name) and isinstance(module, torch.nn.Linear)
    ]
    assert leaves
    assert all(module._diffusers_hook.get_hook("group_offloading") is not None for module in leaves)
    assert torch.equal(draw(pipeline, **LAYOUT), reference)


# Quantised bases ----------------------------------------------------------------------------------------------------


def kinds(unet):
    """Classes of the weights of the base, and of the adapter."""
    own = {id(value) for value in adapter_parameters(unet).values()}
    base = {type(value).__name__ for value in unet.parameters() if id(value) not in own}
    return base, {(type(value).__name__, value.dtype) for value in adapter_parameters(unet).values()}


def test_a_base_that_torchao_quantises_while_loading(folders):
    settings = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "torch_dtype": torch.float32}

    def load(cls):
        unet = UNet2DConditionModel.from_pretrained(folders / "plain" / "unet", **settings)
        return quiet(cls.from_pretrained(folders / "plain", unet=unet))

    pipeline, plain = load(StableDiffusionXLGLIGENPipeline), load(StableDiffusionXLPipeline)
    pipeline.load_gligen_adapter(folders / "adapter")
    assert kinds(pipeline.unet) == ({"Parameter", "Int8Tensor"}, {("Parameter", torch.float32)})
    check_grounded(pipeline, plain)
    assert not torch.equal(draw(plain), draw(plain_pipeline()))  # it was quantised


def test_a_folder_with_its_adapter_beside_it_is_quantised_without_the_adapter(folders):
    pipeline = quiet(
        StableDiffusionXLGLIGENPipeline.from_pretrained(
            folders / "beside",
            quantization_config=PipelineQuantizationConfig(
                quant_mapping={"unet": TorchAoConfig(Int8WeightOnlyConfig())}
            ),
        )
    )
    assert kinds(pipeline.unet) == ({"Parameter", "Int8Tensor"}, {("Parameter", torch.float32)})
    assert differ(draw(pipeline, **LAYOUT), draw(pipeline, **MOVED))


def test_a_gated_folder_is_quantised_only_without_the_adapter_in_it(folders):
    def load(**settings):
        config = TorchAoConfig(Int8WeightOnlyConfig(), **settings)
        return StableDiffusionXLGLIGENPipeline.from_pretrained(
            folders / "gated", quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config})
        )

    with pytest.raises(ValueError, match=r"as Int8Tensor .*not quantised ones.*modules_to_not_convert"):
        load()
    pipeline = quiet(load(modules_to_not_convert=["fuser", "position_net"]))
    assert kinds(pipeline.unet) == ({"Parameter", "Int8Tensor"}, {("Parameter", torch.float32)})
    assert differ(draw(pipeline, **LAYOUT), draw(pipeline, **MOVED))


def test_a_base_that_torchao_quantised_in_place(folders):
    pipeline, plain = sdxl_pipeline(), plain_pipeline()
    for each in (pipeline, plain):
        quantize_(each.unet, Int8WeightOnlyConfig())
    grounded(pipeline)
    assert kinds(pipeline.unet) == ({"Parameter", "Int8Tensor"}, {("Parameter", torch.float32)})
    check_grounded(pipeline, plain)


def test_an_adapter_that_was_quantised_with_its_base_is_not_saved(tmp_path):
    pipeline = grounded(sdxl_pipeline())
    quantize_(pipeline.unet, Int8WeightOnlyConfig())
    assert differ(draw(pipeline, **LAYOUT), draw(pipeline, **MOVED))
    with pytest.raises(ValueError, match=r"Int8Tensor.*saved from floating-point weights"):
        pipeline.save_gligen_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


def quantised_by_bitsandbytes(unet, bits):
    """bitsandbytes' layers in place of every linear one, as diffusers puts them, which itself asks for a GPU."""
    for name, layer in list(unet.named_modules()):
        if type(layer) is not torch.nn.Linear:
            continue
        shape = layer.in_features, layer.out_features, layer.bias is not None
        if bits == 4:
            new = bitsandbytes.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
            new.load_state_dict(layer.state_dict())
        else:
            new = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            new.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(unet.get_submodule(parent), last, new.to("cpu"))
    return unet


@pytest.mark.parametrize(("bits", "kind"), [(8, "Int8Params"), (4, "Params4bit")])
def test_a_base_that_bitsandbytes_quantised(bits, kind, folders):
    pipeline, plain = sdxl_pipeline(), plain_pipeline()
    for each in (pipeline, plain):
        quantised_by_bitsandbytes(each.unet, bits)
    pipeline.load_gligen_adapter(folders / "adapter")
    assert kinds(pipeline.unet) == ({"Parameter", kind}, {("Parameter", torch.float32)})
    check_grounded(pipeline, plain)
    assert not torch.equal(draw(plain), draw(plain_pipeline()))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_gated_unet_whose_adapter_bitsandbytes_quantised_is_refused(bits):
    unet = quantised_by_bitsandbytes(sdxl_unet(attention_type="gated"), bits)
    with pytest.raises(ValueError, match="quantised"):
        adopt_gated(unet)
    assert is_gated(unet)  # as it was


# Layerwise casting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting(compute, tmp_path):
    def casting(pipeline):
        pipeline.to(compute)
        pipeline.unet.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=compute)
        return pipeline

    grounded(sdxl_pipeline()).save_gligen_adapter(tmp_path / "adapter")
    plain = casting(plain_pipeline())
    pipeline, later = casting(grounded(sdxl_pipeline())), casting(sdxl_pipeline())
    image = check_grounded(pipeline, plain)
    stored = {value.dtype for value in adapter_parameters(pipeline.unet).values()}
    assert stored == {FLOAT8, compute}  # gates and norms keep their bits
    later.load_gligen_adapter(tmp_path / "adapter")  # onto a U-Net that casts: as it is
    assert {value.dtype for value in adapter_parameters(later.unet).values()} == {compute}
    torch.testing.assert_close(check_grounded(later, plain), image, atol=0.05, rtol=0)
    pipeline.save_gligen_adapter(tmp_path / "again")
    saved, state = load_file(tmp_path / "again" / "gligen_adapter.safetensors"), adapter_state_dict(pipeline.unet)
    assert {value.dtype for value in saved.values()} == {torch.bfloat16, compute}
    assert all(torch.equal(value.float(), state[name].float()) for name, value in saved.items())


# Compiling ----------------------------------------------------------------------------------------------------------


def small_pipeline():
    """One block of attention in all: each further one is traced for half a second."""
    pipeline = sdxl_pipeline()
    unet = sdxl_unet(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        transformer_layers_per_block=1, attention_head_dim=2,
    )  # fmt: skip
    pipeline.register_modules(unet=unet)
    return grounded(pipeline)


def compile_in_place(pipeline):
    pipeline.unet.compile(backend="eager", fullgraph=True)


def compile_repeated(pipeline):
    pipeline.unet.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize("compiled", [compile_in_place, compile_repeated])
def test_compiling_gives_one_graph_with_grounding_and_one_without(compiled):
    """No break in them, and no other: not as grounding fades, nor for other boxes, numbers of them, or scales."""
    torch._dynamo.reset()
    counters.clear()
    pipeline = small_pipeline()
    fading = LAYOUT | {"gligen_scheduled_sampling_beta": (0.34, 0.66, 0)}
    one = {name: value if name.endswith("beta") else value[:1] for name, value in LAYOUT.items()}
    calls = [LAYOUT, {}, MOVED, fading, one]
    images = [draw(pipeline, **call) for call in calls]
    pipeline.set_gligen_adapter_scale(0.5)
    images.append(draw(pipeline, **LAYOUT))
    pipeline.set_gligen_adapter_scale(1)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(images, 2))

    compiled(pipeline)
    first = draw(pipeline, **LAYOUT)
    assert counters["stats"]["unique_graphs"] == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        got = [first, *(draw(pipeline, **call) for call in calls[1:])]
        pipeline.set_gligen_adapter_scale(0.5)
        got.append(draw(pipeline, **LAYOUT))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for image, expected in zip(got, images, strict=True):
        torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_a_unet_in_the_wrapper_of_torch_compile_is_grounded_faded_and_scaled_as_bare(tmp_path):
    pipeline, plain = grounded(sdxl_pipeline()), draw(plain_pipeline())
    calls = [LAYOUT, MOVED, LAYOUT | {"gligen_scheduled_sampling_beta": (0.34, 0.66, 0)}]
    images = [draw(pipeline, **call) for call in calls]
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # what is compiled is the matter of the test above
        assert all(torch.equal(draw(pipeline, **call), image) for call, image in zip(calls, images, strict=True))
        pipeline.set_gligen_adapter_scale(0)
        assert torch.equal(draw(pipeline, **LAYOUT), plain)
        pipeline.save_gligen_adapter(tmp_path)
        pipeline.unload_gligen_adapter()
        assert torch.equal(draw(pipeline), plain)
        pipeline.load_gligen_adapter(tmp_path)
        assert torch.equal(draw(pipeline, **LAYOUT), images[0])
