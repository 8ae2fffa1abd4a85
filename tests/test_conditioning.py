"""What a training step computes with: embeddings that do not depend on their company, and a GPU that is never waited
for. The GPU is the device "meta" here, which has shapes and no numbers: whoever wants to read one gets an error."""

import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from helpers.rows import METADATA, latents, row
from helpers.tiny import grounded, sd_pipeline, sdxl_pipeline, text_config, tokenizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModelWithProjection

from gligen_xl import device
from gligen_xl.adapter import adapter_parameters, set_grounding_logit_bias
from gligen_xl.data.dataset import Augmentation, Batch, ShardDataset
from gligen_xl.data.shard_writer import write_shard
from gligen_xl.text_embeddings import embed_phrases
from gligen_xl.train.attention import watch_attention
from gligen_xl.train.conditioning import Conditioner
from gligen_xl.train.ema import EMA
from gligen_xl.train.objective import denoising_loss, timesteps_of
from gligen_xl.train.options import Objective
from gligen_xl.train.phrase_cache import PhraseCache
from gligen_xl.train.step import micro_batches, poison_unless_finite
from gligen_xl.train.step_stats import StepStats

SHAPES = ((32, 6), (1, 12), (1, 24), (1, 77))  # those of a CPU
PHRASES = ["ring", "a red ring", "the small grey stone that lies beside a red ring", "sand", "a star", "two stars"]


@pytest.fixture
def batch(tmp_path):
    write_shard(tmp_path / "a", latents(4, side=8), [row(1 + k % 3) for k in range(4)], METADATA)
    dataset = ShardDataset(tmp_path, Augmentation(slots=4, drop_grounding=0, drop_caption=0.5), seed=0)
    batch = dataset.batch([(k, k) for k in range(4)])
    return replace(batch, captions=["grass with a ring", None, "sand", None])


# Kept embeddings ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_encoder():
    """Wide enough for the processor's matrix products to differ with their shape, as those of real encoders do."""
    torch.manual_seed(0)
    config = text_config(256, 256)
    config.num_attention_heads, config.num_hidden_layers = 4, 4
    return CLIPTextModelWithProjection(config).eval()


def test_a_phrase_has_the_same_bits_in_any_company(wide_encoder):
    many = [f"a {colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("ring", "star", "stone")]
    together = embed_phrases([*many, *PHRASES], [tokenizer()], [wide_encoder], shapes=SHAPES)
    torch.testing.assert_close(
        together, embed_phrases([*many, *PHRASES], [tokenizer()], [wide_encoder]), atol=1e-5, rtol=1e-5
    )
    for first in range(len(PHRASES)):
        for count in (1, 2, 5):
            part = PHRASES[first : first + count]
            alone = embed_phrases(part, [tokenizer()], [wide_encoder], shapes=SHAPES)
            assert torch.equal(alone, together[len(many) + first :][: len(part)])


def test_what_is_kept_changes_nothing(batch):
    """A resumed run begins with nothing kept: what it encodes anew is what the former run had kept."""
    pipeline = sdxl_pipeline()
    warm = Conditioner(pipeline, cache_size=5)
    for first in range(4):  # other phrases before, more than are kept
        warm.phrases(replace(batch, phrases=[PHRASES[first : first + 2], [], PHRASES[:1], []]))
    phrases = [PHRASES[:3], PHRASES[3:5], [], PHRASES[1:2]]
    expected = Conditioner(pipeline).phrases(replace(batch, phrases=phrases))
    assert torch.equal(warm.phrases(replace(batch, phrases=phrases)), expected)
    assert torch.equal(Conditioner(pipeline, cache_size=0).phrases(replace(batch, phrases=phrases)), expected)


def numbered(asked: list):
    """An encoder that notes what it is asked for; an embedding is the phrase's number."""

    def encode(phrases):
        asked.append(list(phrases))
        return torch.tensor([[float(phrase)] for phrase in phrases])

    return encode


def test_the_cache_keeps_the_phrases_used_last():
    cache, asked = PhraseCache(3, 1, torch.device("cpu"), torch.float32), []
    encode = numbered(asked)
    for wanted, new in (("12", "12"), ("13", "3"), ("4", "4"), ("13", ""), ("2", "2"), ("413", "4"), ("", "")):
        asked.clear()
        table, row = cache.table(list(wanted), encode)
        assert asked == ([list(new)] if new else [])
        assert [table[row[phrase]].item() for phrase in wanted] == [float(phrase) for phrase in wanted]
        assert table.shape == (4, 1)
        assert table[0].item() == 0


def test_a_batch_of_more_phrases_than_are_kept_passes_the_cache_by():
    cache, asked = PhraseCache(2, 1, torch.device("cpu"), torch.float32), []
    cache.table(["1", "2"], numbered(asked))
    table, row = cache.table(["3", "4", "5"], numbered(asked))
    assert [table[row[phrase]].item() for phrase in "345"] == [3, 4, 5]
    cache.table(["1", "2"], numbered(asked))
    assert asked == [["1", "2"], ["3", "4", "5"]]


def test_each_distinct_phrase_is_encoded_once_in_a_run(batch, monkeypatch):
    pipeline, encoded = sdxl_pipeline(), []
    real = pipeline.text_encoder.forward

    def count(ids, **options):
        encoded.append(tuple(ids.shape))
        return real(ids, **options)

    monkeypatch.setattr(pipeline.text_encoder, "forward", count)
    conditioner = Conditioner(pipeline)
    for _ in range(3):
        conditioner.phrases(replace(batch, phrases=[["a ring", "sand"], ["sand"], [], ["a ring"]]))
    assert encoded == [(32, 6)]  # once 32 rows of 6 tokens, in place of 4 of 77 each time


def test_a_dropped_caption_is_encoded_once_or_never(batch, monkeypatch):
    for pipeline, expected in ((sdxl_pipeline(), [1, 2, 2]), (sd_pipeline(), [1, 2, 2])):
        encoded = []
        real = pipeline.text_encoder.forward
        monkeypatch.setattr(
            pipeline.text_encoder,
            "forward",
            lambda ids, real=real, encoded=encoded, **options: (encoded.append(len(ids)), real(ids, **options))[1],
        )
        conditioner = Conditioner(pipeline)
        for _ in range(2):
            conditioner.captions(batch.captions)
        conditioner.captions([None, None])
        assert sorted(encoded) == expected


# No waiting ---------------------------------------------------------------------------------------------------------


class NoWaiting(TorchFunctionMode):
    """What the CPU has may go to the device through `to_device` alone, which does not wait; a scalar as an argument."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(value.is_meta for value in tensors(result)) and not in_to_device():
            numbers = func is torch.tensor or (func is torch.Tensor.__getitem__ and isinstance(args[1], list))
            from_cpu = any(value.device.type == "cpu" and value.dim() for value in tensors((args, kwargs)))
            if numbers or from_cpu:
                raise AssertionError(f"{func} copies to the device and waits")
        return result


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def in_to_device():
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is device.to_device.__code__:
            return True
        frame = frame.f_back
    return False


def on_meta(make):
    pipeline = grounded(make())
    pipeline.unet.train()
    for part in (pipeline.unet, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if part is not None:
            part.requires_grad_(False).to("meta")
    for value in adapter_parameters(pipeline.unet).values():
        value.requires_grad_(True)
    return pipeline


@pytest.mark.parametrize("make", [sdxl_pipeline, sd_pipeline])
def test_a_step_never_waits_for_the_device(batch, make, monkeypatch):
    pipeline = on_meta(make)
    conditioner = Conditioner(pipeline, cache_size=8)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("meta")  # moves there once, in the first step
    parameters = adapter_parameters(pipeline.unet)
    ema, steps = EMA(parameters, 0.9), StepStats(Accelerator(cpu=True), 0, 4)
    monkeypatch.setattr(Batch, "noise_on", lambda batch, device: torch.empty_like(batch.latents, dtype=torch.float32))
    objective = Objective(snr_gamma=5.0, box_weight=2.0, noisy_bias=0.5)
    with NoWaiting():
        for phrases in (PHRASES[:3], PHRASES[2:], [*PHRASES, "grass"]):
            parts = [phrases[k::4] for k in range(4)]
            moved = replace(batch, phrases=parts).to("meta")
            losses = []
            for part, conditioning, _ in micro_batches(moved, conditioner(moved), 3):
                with watch_attention(pipeline.unet, part.boxes, part.mask, part.latents.shape[-2:]) as attention:
                    loss = denoising_loss(pipeline.unet, scheduler, part, conditioning, objective)
                    poison_unless_finite((loss + attention.mean()).sum() / 4).backward()
                losses.append(loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            ema.update(norm.isfinite())
            set_grounding_logit_bias(pipeline.unet, 0.5)
            quarters = timesteps_of(scheduler, moved, objective.noisy_bias) * 4 // 1000
            steps.add(torch.cat(losses), quarters, norm)
    assert all(value.grad is not None for value in parameters.values())


@pytest.mark.parametrize(
    "wait",
    [
        lambda table, mask: table[[0, 1]],
        lambda table, mask: torch.tensor([1.0, 2.0], device=table.device),
        lambda table, mask: torch.tensor([1.0, 2.0]).to(table.device) + table[0, 0],
        lambda table, mask: table[mask > 0],
        lambda table, mask: table.sum().item(),
        lambda table, mask: bool(table.any()),
        lambda table, mask: table.cpu(),
    ],
)
def test_waiting_would_be_seen(wait):
    """The test above is none if these pass."""
    table, mask = torch.empty(4, 2, device="meta"), torch.empty(4, device="meta")
    with NoWaiting(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(table, mask)


def test_what_goes_to_a_gpu_goes_through_pinned_memory(monkeypatch):
    """Without a GPU: by what is asked of torch."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: (asked.append("pinned"), value)[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda value, *args, **options: (asked.append((args, options)), value)[1])
    device.to_device(torch.zeros(2), "cuda")
    device.to_device(torch.zeros(2), torch.device("cpu"))
    assert asked == ["pinned", (("cuda",), {"non_blocking": True}), ((torch.device("cpu"),), {})]
