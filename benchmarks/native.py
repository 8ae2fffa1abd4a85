"""What our pipeline costs beside diffusers' own gated U-Net, with the same weights: time and peak memory, in one run.

The native way is a plain diffusers pipeline over `UNet2DConditionModel(attention_type="gated")`, driven by hand with
`cross_attention_kwargs={"gligen": ...}`; its phrases are embedded by our function, as diffusers has none for SDXL. The
model has SDXL's proportions at about a third of its width.

python benchmarks/native.py
python benchmarks/native.py --steps 10 --size 256 --threads 2
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from models import SMALL_TEXT, SMALL_UNET, SMALL_VAE, parts, peak_memory

from gligen_xl import StableDiffusionXLGLIGENPipeline
from gligen_xl.text_embeddings import embed_phrases

PROMPT = "grass with a red circle and a blue star"
PHRASES, BOXES = ["a red circle", "a blue star"], [[0.1, 0.5, 0.5, 0.9], [0.5, 0.1, 0.9, 0.5]]
SLOTS = 30


def components(dtype: torch.dtype) -> dict:
    return parts(SMALL_UNET, SMALL_VAE, SMALL_TEXT, dtype, attention_type="gated")


def native_pipeline(made: dict) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline(**made, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def native_tokens(pipeline: StableDiffusionXLPipeline) -> dict:
    """By hand: boxes, masks and phrase embeddings, [negative, positive]."""
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    rows = embed_phrases(PHRASES, [pipeline.tokenizer, pipeline.tokenizer_2], encoders)
    tokens = {"boxes": torch.zeros(2, SLOTS, 4), "masks": torch.zeros(2, SLOTS)}
    tokens["positive_embeddings"] = torch.zeros(2, SLOTS, rows.shape[1])
    tokens["boxes"][1, :2], tokens["masks"][1, :2] = torch.tensor(BOXES), 1
    tokens["positive_embeddings"][1, :2] = rows
    return tokens


def ours_pipeline(made: dict) -> StableDiffusionXLGLIGENPipeline:
    pipeline = StableDiffusionXLGLIGENPipeline(**made, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def calls(kinds: tuple[str, ...], steps: int, size: int) -> dict:
    """By kind, a function that makes one image."""
    settings = {"num_inference_steps": steps, "width": size, "height": size, "output_type": "latent"}

    def noise() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    made = {}
    if {"native on", "native off"} & set(kinds):
        native = native_pipeline(components(torch.float32))

        def native_on():
            gligen = {"gligen": native_tokens(native)}
            return native(PROMPT, generator=noise(), cross_attention_kwargs=gligen, **settings).images

        made["native on"] = native_on
        made["native off"] = lambda: native(PROMPT, generator=noise(), **settings).images
    if {"ours on", "ours off"} & set(kinds):
        ours = ours_pipeline(components(torch.float32))
        layout = {"gligen_phrases": PHRASES, "gligen_boxes": BOXES, "gligen_scheduled_sampling_beta": 1.0}
        made["ours on"] = lambda: ours(PROMPT, generator=noise(), **layout, **settings).images
        made["ours off"] = lambda: ours(PROMPT, generator=noise(), **settings).images
        four = {
            "gligen_phrases": [PHRASES[: 1 + k % 2] for k in range(4)],
            "gligen_boxes": [BOXES[: 1 + k % 2] for k in range(4)],
            "gligen_scheduled_sampling_beta": 1.0,
        }
        made["batch of 4 layouts"] = lambda: ours([PROMPT] * 4, generator=noise(), **four, **settings).images

        def one_by_one():
            for phrases, boxes in zip(four["gligen_phrases"], four["gligen_boxes"], strict=True):
                one = {"gligen_phrases": phrases, "gligen_boxes": boxes, "gligen_scheduled_sampling_beta": 1.0}
                ours(PROMPT, generator=noise(), **one, **settings)

        made["4 layouts one by one"] = one_by_one
    return {kind: made[kind] for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        calls((options.memory,), options.steps, options.size)[options.memory]()
        print(json.dumps(peak_memory()))
        return
    with torch.device("meta"):
        size = sum(value.numel() for value in UNet2DConditionModel(**SMALL_UNET, attention_type="gated").parameters())
    print(f"U-Net with adapter {size / 1e6:.0f} M, {options.steps} steps at {options.size}, {options.threads} threads")
    kinds = ("native on", "ours on", "native off", "ours off", "batch of 4 layouts", "4 layouts one by one")
    every = calls(kinds, options.steps, options.size)
    difference = (every["native on"]() - every["ours on"]()).abs().max()
    print(f"largest difference of the latents, native and ours: {difference:.1e}")
    assert difference < 1e-5
    times = {kind: [] for kind in kinds}
    for _ in range(options.repeats):  # turn by turn, so that what else the machine does meets all alike
        for kind, call in every.items():
            began = time.perf_counter()
            call()
            times[kind].append(time.perf_counter() - began)
    for kind, taken in times.items():
        print(f"  {kind:<22} {statistics.median(taken):.2f} s")
    for ours, theirs in (("ours on", "native on"), ("ours off", "native off"), kinds[-2:]):
        ratios = [a / b for a, b in zip(times[ours], times[theirs], strict=True)]
        print(f"time, {ours} / {theirs}: {statistics.median(ratios):.2f}")
    peaks = {}
    for kind in kinds[:4]:
        words = ["--memory", kind, "--threads", str(options.threads)]
        words += ["--steps", str(options.steps), "--size", str(options.size)]
        done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])
    for state in ("on", "off"):
        ratio = peaks[f"ours {state}"] / peaks[f"native {state}"]
        print(f"peak memory, ours {state} / native {state}: {ratio:.2f} ({peaks[f'ours {state}']:.2f} GiB)")


if __name__ == "__main__":
    main()
