"""SDXL's true size in this machine's memory: a few steps at 512 x 512 with the adapter and without, random weights.

The U-Net and its adapter lie in memory in bfloat16 and compute in float32 (diffusers' layerwise casting): many CPUs
have no convolution in bfloat16 to speak of.

python benchmarks/real_size.py            # both, each in a process of its own; about 14 GiB
python benchmarks/real_size.py --steps 4 --size 1024
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from diffusers import UNet2DConditionModel
from models import SDXL_TEXT, SDXL_UNET, SDXL_VAE, parts, peak_memory
from torch import nn

from gligen_xl import AdapterConfig, StableDiffusionXLGLIGENPipeline
from gligen_xl.adapter import adapter_parameters, attach


def random_tensor(shape: torch.Size) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


def put_adapter_on(unet: UNet2DConditionModel) -> None:
    config = AdapterConfig(cross_attention_dim=2048, phrase_dim=2048)
    with torch.device("meta"):
        shapes = UNet2DConditionModel(**SDXL_UNET)
    attach(shapes, config)
    attach(unet, config, state={name: random_tensor(x.shape) for name, x in adapter_parameters(shapes).items()})


def compute_in_float32(unet: UNet2DConditionModel) -> None:
    """Layers keep their bfloat16 and are widened when they run; what is no layer (norms, gates) is float32 for good."""
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or "norm" in name:
            module._apply(torch.Tensor.float, recurse=False)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def measure(kind: str, steps: int, size: int) -> dict:
    made = parts(SDXL_UNET, SDXL_VAE, SDXL_TEXT, torch.float32, unet_dtype=torch.bfloat16)
    pipeline = StableDiffusionXLGLIGENPipeline(**made, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    layout = {}
    if kind == "with":
        put_adapter_on(pipeline.unet)
        layout = {
            "gligen_phrases": ["a red circle", "a blue star"],
            "gligen_boxes": [[0.1, 0.5, 0.5, 0.9], [0.5, 0.1, 0.9, 0.5]],
            "gligen_scheduled_sampling_beta": 1.0,
        }
    compute_in_float32(pipeline.unet)
    loaded, began = peak_memory(), time.perf_counter()
    image = pipeline(
        "grass with a red circle and a blue star",
        num_inference_steps=steps,
        width=size,
        height=size,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **layout,
    ).images[0]
    assert image.shape == (size, size, 3)
    return {
        "seconds": time.perf_counter() - began,
        "peak": peak_memory(),
        "loaded": loaded,
        "unet": sum(value.numel() for value in pipeline.unet.parameters()),
        "adapter": sum(value.numel() for value in adapter_parameters(pipeline.unet).values()) if layout else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--only", choices=["with", "without"])
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.steps, options.size)))
        return
    results = {}
    for kind in ("without", "with"):
        words = ["--only", kind, "--steps", str(options.steps), "--size", str(options.size)]
        done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        results[kind] = json.loads(done.stdout.splitlines()[-1])
        got = results[kind]
        print(
            f"{kind:>7} adapter: {got['unet']:,} parameters in the U-Net ({got['adapter']:,} of the adapter), "
            f"{got['seconds']:.0f} s for {options.steps} steps at {options.size}, peak {got['peak']:.1f} GiB"
        )
    plain, grounded = results["without"], results["with"]
    time_ratio, memory_ratio = (grounded[name] / plain[name] for name in ("seconds", "peak"))
    print(f"with / without: time {time_ratio:.2f}, memory {memory_ratio:.2f}")


if __name__ == "__main__":
    main()
