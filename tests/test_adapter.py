"""The adapter: contracts 1, 2 and 3 of the design, on U-Nets of SDXL's and Stable Diffusion's form."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.adapters import PHRASE_DIM, SLOTS, config_for, inputs, run
from helpers.tiny import open_gates, sd15_unet, sdxl_unet

from gligen_xl.adapter import (
    AdapterConfig,
    adapter_config,
    adapter_parameters,
    adapter_state_dict,
    adopt_gated,
    attach,
    detach,
    detached,
    fusers,
    gate_values,
    is_attached,
    load_adapter,
    load_adapter_state_dict,
    reattach,
    save_adapter,
    set_adapter_scale,
)
from gligen_xl.adapter.layers import Fuser, fourier_features
from gligen_xl.adapter.unet import transformer_blocks
from gligen_xl.train.known_bases import SDXL_UNET


def test_a_fresh_adapter_changes_no_bit(unet):
    plain = run(unet, grounded=False)
    attach(unet, config_for(unet))
    assert len(fusers(unet)) == len(transformer_blocks(unet)) > 1
    assert torch.equal(run(unet), plain)
    assert torch.equal(run(unet, grounded=False), plain)


def test_open_gates_follow_boxes_and_phrases(unet):
    attach(unet, config_for(unet))
    open_gates(unet)
    result = run(unet)
    assert (result - run(unet, grounded=False)).abs().max() > 1e-3
    tokens = inputs(unet)[1]["cross_attention_kwargs"]["gligen"]
    assert (run(unet, boxes=tokens["boxes"] * 0.5) - result).abs().max() > 1e-4
    assert (run(unet, positive_embeddings=-tokens["positive_embeddings"]) - result).abs().max() > 1e-4
    # what lies in unused slots does not matter
    noisy = torch.where(tokens["masks"][..., None] > 0, tokens["boxes"], torch.rand_like(tokens["boxes"]))
    assert torch.equal(run(unet, boxes=noisy), result)


def test_detach_restores_the_very_modules(unet):
    before, settings = dict(unet.named_modules()), dict(unet.config)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    plain = run(unet, grounded=False)
    attach(unet, config_for(unet))
    open_gates(unet)
    detach(unet)
    after = dict(unet.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())
    assert dict(unet.config) == settings
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert torch.equal(run(unet, grounded=False), plain)


def test_detached_for_a_while(unet):
    attach(unet, config_for(unet))
    open_gates(unet)
    result = run(unet)
    with pytest.raises(RuntimeError, match="inside"), detached(unet):
        assert not is_attached(unet)
        raise RuntimeError("inside")
    assert torch.equal(run(unet), result)
    carried = detach(unet)
    reattach(unet, carried)
    assert torch.equal(run(unet), result)


@pytest.mark.parametrize("make", [sdxl_unet, sd15_unet], ids=["sdxl", "sd15"])
def test_equal_to_diffusers_gated_unet(make):
    """The same weights in diffusers' own fusers and position net."""
    ours = make()
    attach(ours, config_for(ours))
    open_gates(ours)
    settings = {name: value for name, value in ours.config.items() if not name.startswith("_")}
    theirs = UNet2DConditionModel(**settings | {"attention_type": "gated"})
    # diffusers sizes the position net for phrases as wide as the text; the tiny one's phrases are narrower
    theirs.position_net = type(theirs.position_net)(
        positive_len=PHRASE_DIM, out_dim=ours.config.cross_attention_dim, feature_type="text-only"
    )
    theirs.eval().load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(run(ours), run(theirs), atol=1e-5, rtol=1e-5)
    adopt_gated(theirs, slots=SLOTS)
    assert isinstance(next(iter(fusers(theirs).values())), Fuser)
    assert torch.equal(run(theirs), run(ours))


def test_true_size_on_the_meta_device():
    """70 fusers, 1,812,438,988 parameters, names and shapes of diffusers' gated SDXL U-Net."""
    with torch.device("meta"):
        ours = UNet2DConditionModel(**SDXL_UNET)
        theirs = UNet2DConditionModel(**SDXL_UNET, attention_type="gated")
    assert sum(value.numel() for value in ours.parameters()) == 2_567_463_684
    attach(ours, AdapterConfig(cross_attention_dim=2048, phrase_dim=2048))
    assert len(fusers(ours)) == 70
    adapter = adapter_parameters(ours)
    assert sum(value.numel() for value in adapter.values()) == 1_812_438_988
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


def test_save_and_load_give_the_same_output(unet, tmp_path):
    attach(unet, config_for(unet))
    open_gates(unet)
    result = run(unet)
    save_adapter(unet, tmp_path, metadata={"base_model": "tiny"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gligen_adapter.json", "gligen_adapter.safetensors"]
    assert json.loads((tmp_path / "gligen_adapter.json").read_text())["base_model"] == "tiny"
    detach(unet)
    assert load_adapter(unet, tmp_path) == config_for(unet)
    assert torch.equal(run(unet), result)
    state = adapter_state_dict(unet)
    assert all(name.startswith("position_net.") or ".fuser." in name for name in state)


def test_an_adapter_in_half_precision_runs_on_a_base_in_full(tmp_path):
    unet = sdxl_unet()
    attach(unet, config_for(unet))
    open_gates(unet)
    result = run(unet)
    save_adapter(unet, tmp_path, dtype=torch.float16)
    detach(unet)
    load_adapter(unet, tmp_path)
    assert all(value.dtype == torch.float32 for value in adapter_parameters(unet).values())
    torch.testing.assert_close(run(unet), result, atol=2e-2, rtol=0)


def test_loading_a_wrong_adapter_leaves_the_unet_alone(tmp_path):
    other, unet = sdxl_unet(block_out_channels=(8, 16, 64)), sdxl_unet()
    attach(other, config_for(other))
    save_adapter(other, tmp_path)
    plain = run(unet, grounded=False)
    with pytest.raises(ValueError, match="for another base model"):
        load_adapter(unet, tmp_path)
    assert not is_attached(unet)
    assert torch.equal(run(unet, grounded=False), plain)
    narrow = sd15_unet()
    with pytest.raises(ValueError, match="cross-attention width of 40, the U-Net has 24"):
        load_adapter(narrow, tmp_path)


def test_damaged_files_are_named(unet, tmp_path):
    attach(unet, config_for(unet))
    save_adapter(unet, tmp_path)
    detach(unet)
    weights, description = tmp_path / "gligen_adapter.safetensors", tmp_path / "gligen_adapter.json"
    whole, said = weights.read_bytes(), json.loads(description.read_text())
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"gligen_adapter\.safetensors is damaged"):
        load_adapter(unet, tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no gligen_adapter\.safetensors"):
        load_adapter(unet, tmp_path)
    weights.write_bytes(whole)
    for change, says in (
        ({"format": "other"}, "does not describe an adapter"),
        ({"version": 99}, "version 99"),
        ({"config": {"cross_attention_dim": 40}}, "phrase_dim"),
        ({"config": said["config"] | {"colour": 1}}, "colour"),
        ({"config": said["config"] | {"slots": -1}}, "slots is -1"),
    ):
        description.write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=says):
            load_adapter(unet, tmp_path)
    description.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_adapter(unet, tmp_path)
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        load_adapter(unet, tmp_path / "nowhere" / "at" / "all")
    assert not is_attached(unet)


def test_a_state_that_does_not_fit_changes_nothing(unet):
    attach(unet, config_for(unet))
    open_gates(unet)
    before = {name: value.clone() for name, value in adapter_state_dict(unet).items()}
    name = next(reversed(before))
    for broken in ({**before, name: torch.zeros(3, 3)}, {k: v for k, v in before.items() if k != name}):
        with pytest.raises(ValueError, match="does not fit"):
            load_adapter_state_dict(unet, {k: v * 0 for k, v in broken.items()})
    assert all(torch.equal(value, before[name]) for name, value in adapter_state_dict(unet).items())


def test_attaching_twice_and_asking_a_plain_unet(unet):
    with pytest.raises(ValueError, match="carries no GLIGEN adapter"):
        adapter_config(unet)
    attach(unet, config_for(unet))
    with pytest.raises(ValueError, match="already carries"):
        attach(unet, config_for(unet))


def test_scale_is_a_run_time_multiplier(unet):
    attach(unet, config_for(unet))
    open_gates(unet)
    result, off = run(unet), run(unet, grounded=False)
    set_adapter_scale(unet, 0)
    assert torch.equal(run(unet), off)
    set_adapter_scale(unet, 1)
    assert torch.equal(run(unet), result)
    gates = gate_values(unet)
    assert len(gates) == 2 * len(fusers(unet))
    assert all(0 < value < 1 for value in gates.values())


def test_fusers_on_some_blocks_and_a_logit_bias(tmp_path):
    unet = sdxl_unet()
    settings = config_for(unet, every=2, grounding_logit_bias=1.5)
    attach(unet, settings)
    blocks = len(transformer_blocks(unet))
    assert len(fusers(unet)) == -(-blocks // 2)
    assert unet.config.attention_type == "default"  # diffusers' gated form cannot hold this
    open_gates(unet)
    result = run(unet)
    save_adapter(unet, tmp_path)
    detach(unet)
    assert load_adapter(unet, tmp_path) == settings
    assert torch.equal(run(unet), result)
    for fuser in fusers(unet).values():
        fuser.attn.grounding_logit_bias = 0.0
    assert (run(unet) - result).abs().max() > 1e-5


def test_the_logit_bias_is_that_of_the_softmax():
    """A bias of log(visual / slots) gives grounding tokens half of the attention when all logits are equal."""
    fuser = Fuser(8, 2, 8, grounding_logit_bias=float(torch.tensor(16 / 4).log()))
    attention = fuser.attn
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            layer.weight.zero_()
        attention.to_v.weight.copy_(torch.eye(8))
        attention.to_out[0].weight.copy_(torch.eye(8))
        attention.to_out[0].bias.zero_()
        tokens = torch.cat([torch.zeros(1, 16, 8), torch.ones(1, 4, 8)], dim=1)
        torch.testing.assert_close(attention(tokens, 16), torch.full((1, 16, 8), 0.5))


def test_fourier_features_are_those_of_the_paper_and_stay_exact_in_half_precision():
    boxes = torch.rand(3, 2, 4)
    features = fourier_features(boxes)
    assert features.shape == (3, 2, 64)
    for k in range(8):
        for j in range(4):
            angle = boxes[..., j] * 100 ** (k / 8)
            torch.testing.assert_close(features[..., k * 8 + j], angle.sin())
            torch.testing.assert_close(features[..., k * 8 + 4 + j], angle.cos())
    assert fourier_features(boxes.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"slots": 0}, "slots is 0"), ({"every": True}, "every"), ({"grounding_logit_bias": float("nan")}, "bias")],
)
def test_wrong_configurations(settings, says):
    with pytest.raises(ValueError, match=says):
        AdapterConfig(cross_attention_dim=8, phrase_dim=8, **settings)


def test_a_compiled_unet_keeps_its_adapter(tmp_path):
    """`torch.compile` wraps the U-Net; the adapter is that of the U-Net inside."""
    unet = sdxl_unet()
    attach(unet, config_for(unet))
    open_gates(unet)
    expected = run(unet)
    compiled = torch.compile(unet, backend="eager")
    torch.testing.assert_close(run(compiled), expected, atol=1e-5, rtol=0)
    assert is_attached(compiled)
    save_adapter(compiled, tmp_path)
    with detached(compiled):
        assert not is_attached(unet)
        load_adapter(compiled, tmp_path)
        torch.testing.assert_close(run(compiled), expected, atol=1e-5, rtol=0)
        detach(compiled)
