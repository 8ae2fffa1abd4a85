"""What grounding costs: seconds an image with it and without, on the embedded model, in one run.

make bench
python benchmarks/generate.py --steps 20 --threads 1
"""

import argparse
import statistics
import time

import torch

from gligen_xl import StableDiffusionXLGLIGENPipeline
from gligen_xl.generate import generate
from gligen_xl.text_embeddings import embed_phrases
from gligen_xl.toyworld.layouts import held_out_layouts


def seconds(call, repeats: int) -> float:
    """Median of `repeats` runs, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = StableDiffusionXLGLIGENPipeline.from_pretrained("shapes")
    pipeline.set_progress_bar_config(disable=True)
    layouts = held_out_layouts(8)
    settings = {"num_inference_steps": options.steps, "guidance_scale": 2.0, "batch_size": 1}

    def run(**kind) -> float:
        return seconds(lambda: list(generate(pipeline, layouts, **kind, **settings)), options.repeats) / len(layouts)

    plain = run(grounded=False)
    print(f"an image of {options.steps} steps, {options.threads} threads, float32:")
    print(f"  without grounding  {plain:.2f} s")
    for beta in (1.0, 0.4):
        took = run(beta=beta)
        print(f"  beta {beta:<14} {took:.2f} s, {took / plain:.2f} times as long")

    phrases = [phrase for layout in held_out_layouts(64) for phrase in layout.phrases]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    distinct = list(dict.fromkeys(phrases))

    @torch.no_grad()
    def padded() -> None:
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            encoder(tokenizer(distinct, padding="max_length", return_tensors="pt").input_ids)

    shorter, full = (
        seconds(call, options.repeats) for call in (lambda: embed_phrases(phrases, tokenizers, encoders), padded)
    )
    print(f"{len(distinct)} phrases: padded to the longest {full / shorter:.1f} times as fast as padded to the limit")


if __name__ == "__main__":
    main()
