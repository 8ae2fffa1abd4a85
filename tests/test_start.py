"""How an adapter begins: gates, weights of the self-attention, a share of the attention, a bias that fades out."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.adapters import config_for, inputs, run
from helpers.tiny import open_gates, sdxl_pipeline, sdxl_unet
from helpers.tiny_run import train_until, write_data

from gligen_xl.adapter import (
    adapter_config,
    adapter_state_dict,
    attach,
    detach,
    fusers,
    gate_values,
    is_attached,
    load_adapter,
    reattach,
    save_adapter,
    set_grounding_logit_bias,
)
from gligen_xl.adapter.unet import transformer_blocks
from gligen_xl.data.dataset import Augmentation
from gligen_xl.train import step
from gligen_xl.train.checkpoint import list_checkpoints
from gligen_xl.train.config import TrainConfig
from gligen_xl.train.init import discriminant, init_adapter_weights
from gligen_xl.train.loop import train
from gligen_xl.train.options import AdapterOptions, Optimization


def started(unet=None, look=None, **options):
    unet = unet or sdxl_unet()
    attach(unet, config_for(unet))
    init_adapter_weights(unet, AdapterOptions(**options), look or (lambda: run(unet)))
    return unet


def shares(unet, batch):
    """What every fuser gives the grounding tokens of `batch`, (arguments, keywords): the softmax written out."""
    found = {}

    def measure(name):
        def hook(fuser, given):
            x, objs = given
            tokens, heads = fuser.norm1(torch.cat([x, fuser.linear(objs)], dim=1)), fuser.attn.heads
            query, key = (
                layer(tokens).reshape(*tokens.shape[:2], heads, -1) for layer in (fuser.attn.to_q, fuser.attn.to_k)
            )
            logits = torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
            count = x.shape[1]
            found[name] = logits[:, :, :count].softmax(-1)[..., count:].sum(-1).mean().item()

        return hook

    hooks = [fuser.register_forward_pre_hook(measure(name)) for name, fuser in fusers(unet).items()]
    with torch.no_grad():
        unet(*batch[0], **batch[1])
    for hook in hooks:
        hook.remove()
    return found


def other_inputs(unet):
    """Other noise, other boxes, other phrases, another timestep."""
    (sample, _), keywords = inputs(unet)
    tokens = keywords["cross_attention_kwargs"]["gligen"]
    corners = torch.rand(*tokens["boxes"].shape[:2], 2, 2).sort(dim=2).values.flatten(2)
    tokens = tokens | {"boxes": corners, "positive_embeddings": torch.randn_like(tokens["positive_embeddings"])}
    text = torch.randn_like(keywords["encoder_hidden_states"])
    keywords |= {"encoder_hidden_states": text, "cross_attention_kwargs": {"gligen": tokens}}
    return (torch.randn_like(sample), torch.tensor([300, 900])), keywords


def test_by_default_nothing_is_changed():
    unet = sdxl_unet()
    attach(unet, config_for(unet))
    before = {name: value.clone() for name, value in adapter_state_dict(unet).items()}
    init_adapter_weights(unet, AdapterOptions(), lambda: pytest.fail("nothing has to be looked at"))
    assert all(torch.equal(value, before[name]) for name, value in adapter_state_dict(unet).items())


def test_gates_begin_where_they_are_told():
    unet = started(gate_init=0.05)
    values = gate_values(unet)
    assert list(values.values()) == pytest.approx([0.05] * (2 * len(fusers(unet))))
    assert (run(unet) - run(unet, grounded=False)).abs().max() > 1e-5


def test_a_fuser_that_begins_as_the_self_attention_computes_it():
    unet = sdxl_unet()
    for index, (name, value) in enumerate(unet.named_parameters()):  # norms that are not those of a fresh network
        if "norm" in name:
            value.data.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(index)) * 0.3)
    plain = run(unet, grounded=False)
    started(unet, fuser_init="self_attention")
    assert torch.equal(run(unet), plain)  # behind closed gates
    for block in transformer_blocks(unet).values():
        x = torch.randn(2, 9, block.dim)
        expected = block.attn1(block.norm1(x))
        torch.testing.assert_close(block.fuser.attn(block.fuser.norm1(x), 9), expected)
        torch.testing.assert_close(block.fuser.norm2(x), block.norm3(x))


def test_a_self_attention_of_another_form_is_refused():
    unet = sdxl_unet()
    attach(unet, config_for(unet))
    name, block = next(iter(transformer_blocks(unet).items()))
    block.attn1.to_k = torch.nn.Linear(block.dim, block.dim // 2, bias=False)
    with pytest.raises(ValueError, match=rf"{name} cannot begin.*attn\.to_k\.weight.*set adapter\.fuser_init to fresh"):
        init_adapter_weights(unet, AdapterOptions(fuser_init="self_attention"), lambda: None)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_grounding_tokens_get_their_share(share):
    unet = started(grounding_share=share)
    assert list(shares(unet, inputs(unet)).values()) == pytest.approx([share] * len(fusers(unet)), abs=0.01)
    got = list(shares(unet, other_inputs(unet)).values())  # also of what it was not measured on
    assert got == pytest.approx([share] * len(fusers(unet)), abs=0.15)
    assert sum(got) / len(got) == pytest.approx(share, abs=0.07)


def test_on_the_embedded_model_a_share_holds_for_other_images(shapes_pipeline):
    """A trained base: fresh fusers, and those of the self-attention. Noise, boxes, phrases and timesteps are others."""
    unet, count = shapes_pipeline.unet, 8
    carried = detach(unet)
    form = replace(carried.config, grounding_logit_bias=0.0)
    text, _, pooled, _ = shapes_pipeline.encode_prompt(["grass", "the sea with a ring"] * (count // 2))

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        corners = torch.rand(count, form.slots, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
        mask = (torch.rand(count, form.slots, generator=generator) < 0.5).float()
        phrases = torch.randn(count, form.slots, form.phrase_dim, generator=generator)
        keywords = {
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.full((count, 6), 64.0)},
            "cross_attention_kwargs": {"gligen": {"boxes": corners, "masks": mask, "positive_embeddings": phrases}},
        }
        sample, time = torch.randn(count, 4, 16, 16, generator=generator), torch.rand(count, generator=generator)
        return (sample, (time * 1000).long()), keywords

    try:
        for init in ("fresh", "self_attention"):
            attach(unet, form)
            fresh = list(shares(unet, batch(1)).values())
            args, keywords = batch(0)
            options = AdapterOptions(grounding_share=0.5, fuser_init=init)
            init_adapter_weights(unet, options, lambda args=args, keywords=keywords: unet(*args, **keywords))
            got = list(shares(unet, batch(1)).values())
            detach(unet)
            assert min(fresh) < 0.05
            assert got == pytest.approx([0.5] * len(got), abs=0.2)
            assert sum(got) / len(got) == pytest.approx(0.5, abs=0.05)
    finally:
        if is_attached(unet):
            detach(unet)
        reattach(unet, carried)


def test_the_share_is_in_the_weights_alone(tmp_path):
    """Behind closed gates nothing changes; the file has the published form, and gives the share again."""
    unet = sdxl_unet()
    plain = run(unet, grounded=False)
    started(unet, grounding_share=0.5)
    assert torch.equal(run(unet), plain)
    assert adapter_config(unet).published_form
    save_adapter(unet, tmp_path)
    other = sdxl_unet()
    load_adapter(other, tmp_path)
    assert shares(other, inputs(other)) == shares(unet, inputs(unet))


def test_the_discriminant_tells_two_clouds_apart():
    loud = torch.tensor([1.0, 10.0, 0.1])  # they differ in the first number; the second is only loud
    ones, others = torch.randn(500, 3) * loud + torch.tensor([3.0, 5.0, 0.0]), torch.randn(500, 3) * loud
    direction = discriminant(ones, others)
    assert ((ones - others) @ direction).mean().item() == pytest.approx(1, abs=1e-4)
    assert (ones @ direction).std() < (ones[:, 1] / (ones[:, 1].mean() - others[:, 1].mean())).std()
    few = torch.randn(2, 64), torch.randn(3, 64)  # fewer than dimensions
    assert ((few[0].mean(0) - few[1].mean(0)) @ discriminant(*few)).item() == pytest.approx(1, abs=1e-4)


# In a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    sdxl_pipeline().save_pretrained(tmp_path / "base")
    data = write_data(tmp_path / "data")
    return TrainConfig(
        model=str(tmp_path / "base"), data=str(data), out=str(tmp_path / "run"), samples=32, batch_size=4,
        checkpoint_every=8, keep_checkpoints=9, track=[], augmentation=Augmentation(slots=3),
        optimization=Optimization(learning_rate=1e-2, warmup_samples=8),
    )  # fmt: skip


def bias_of(folder):
    return json.loads((folder / "gligen_adapter.json").read_text())["config"]["grounding_logit_bias"]


def test_a_bias_fades_out_and_the_run_goes_on_exactly(config, tmp_path):
    config = replace(config, adapter=AdapterOptions(grounding_logit_bias=2.0, bias_share=0.75))
    finished = train(replace(config, out=str(tmp_path / "whole")))
    checkpoints = list_checkpoints(tmp_path / "whole")
    assert [bias_of(folder) for folder in checkpoints] == pytest.approx([2 - 2 * p / 24 for p in (8, 16, 24)] + [0])
    assert bias_of(finished) == 0
    train_until(20, config)
    again = train(config)
    for name in ("gligen_adapter.safetensors", "weights.safetensors", "optimizer.safetensors"):
        assert (list_checkpoints(config.out)[-1] / name).read_bytes() == (checkpoints[-1] / name).read_bytes()
    unet = sdxl_pipeline().unet
    assert load_adapter(unet, again).published_form
    detach(unet)
    assert load_adapter(unet, checkpoints[0]).grounding_logit_bias == pytest.approx(4 / 3)
    fixed = train(replace(config, out=str(tmp_path / "fixed"), adapter=AdapterOptions(grounding_logit_bias=2.0)))
    assert bias_of(fixed) == 2
    weights = [(folder / "gligen_adapter.safetensors").read_bytes() for folder in (fixed, finished)]
    assert weights[0] != weights[1]


def test_every_step_has_the_bias_of_its_position(config, monkeypatch):
    seen, real = {}, step.denoising_loss

    def note(unet, scheduler, batch, *rest):
        seen[batch.position] = {fuser.attn.grounding_logit_bias for fuser in fusers(unet).values()}
        return real(unet, scheduler, batch, *rest)

    monkeypatch.setattr(step, "denoising_loss", note)
    train(replace(config, adapter=AdapterOptions(grounding_logit_bias=1.6, bias_share=0.5)))
    assert {p: values.pop() for p, values in seen.items()} == pytest.approx(
        {p: max(0.0, 1.6 * (1 - p / 16)) for p in range(0, 32, 4)}
    )


def test_a_run_begins_as_its_options_say_and_goes_on_exactly(config, tmp_path):
    options = AdapterOptions(grounding_share=0.5, gate_init=0.1, fuser_init="self_attention", blocks="first")
    config = replace(config, adapter=options, samples=16)
    finished = train(replace(config, out=str(tmp_path / "whole")))
    train_until(12, config)
    name = "gligen_adapter.safetensors"
    assert (train(config) / name).read_bytes() == (finished / name).read_bytes()
    unet = sdxl_pipeline().unet
    assert load_adapter(unet, finished).blocks == "first"
    assert len(fusers(unet)) < len(transformer_blocks(unet))
    assert all(value > 0.05 for value in gate_values(unet).values())


def test_the_bias_that_is_set_is_what_is_computed_and_saved():
    unet, expected = sdxl_unet(), sdxl_unet()
    attach(unet, config_for(unet))
    attach(expected, config_for(expected, grounding_logit_bias=1.5))
    open_gates(unet)
    open_gates(expected)
    published, settings = run(unet), dict(unet.config)
    set_grounding_logit_bias(unet, 1.5)
    assert torch.equal(run(unet), run(expected))
    assert adapter_config(unet) == adapter_config(expected)
    assert dict(unet.config) == dict(expected.config)
    set_grounding_logit_bias(unet, 0.0)
    assert torch.equal(run(unet), published)
    assert dict(unet.config) == settings
    detach(unet)
    assert dict(unet.config) == dict(sdxl_unet().config)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bias_share": 0.5}, "nothing to fade out"),
        ({"grounding_logit_bias": 1.0, "bias_share": 0.0}, "bias_share is 0"),
        ({"grounding_logit_bias": 1.0, "bias_share": 1.5}, r"bias_share is 1\.5"),
        ({"gate_init": 1.0}, "gate_init is 1"),
        ({"grounding_share": 1.0}, "grounding_share is 1"),
        ({"grounding_share": 0.5, "grounding_logit_bias": 1.0}, "choose one"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ValueError, match=says):
        AdapterOptions(**options)


@pytest.mark.parametrize("options", [{"gate_init": 0.1}, {"fuser_init": "self_attention"}, {"grounding_share": 0.5}])
def test_an_adapter_that_is_given_does_not_begin_again(config, options):
    with pytest.raises(ValueError, match="leave them out beside init_adapter some"):
        replace(config, init_adapter="some", adapter=AdapterOptions(**options))
