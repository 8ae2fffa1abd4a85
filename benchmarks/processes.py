"""Training the shapes U-Net: one process on all cores against one process a core, samples a second, in one run.

python benchmarks/processes.py
"""

import argparse
import os
import subprocess
import sys
import time

import torch

from gligen_xl.toyworld.model import LATENT_SIZE, TEXT_WIDTH, new_unet


def samples_per_second(batch_size: int, threads: int, steps: int) -> float:
    """Forward and backward of the U-Net, after two steps that are not counted."""
    torch.set_num_threads(threads)
    unet = new_unet()
    sample = torch.randn(batch_size, 4, LATENT_SIZE, LATENT_SIZE)
    conditioning = {
        "encoder_hidden_states": torch.randn(batch_size, 48, 2 * TEXT_WIDTH),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch_size, TEXT_WIDTH),
            "time_ids": torch.zeros(batch_size, 6),
        },
    }
    began = 0.0
    for step in range(steps + 2):
        if step == 2:
            began = time.perf_counter()
        unet(sample, torch.randint(0, 1000, (batch_size,)), **conditioning).sample.square().mean().backward()
        unet.zero_grad()
    return steps * batch_size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=64, help="of all processes together")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:  # one of the processes
        print(samples_per_second(options.batch_size, 1, options.steps))
        return
    together = samples_per_second(options.batch_size, options.cores, options.steps)
    share = [sys.executable, __file__, "--alone", "--steps", str(options.steps)]
    share += ["--batch_size", str(options.batch_size // options.cores)]
    processes = [subprocess.Popen(share, stdout=subprocess.PIPE, text=True) for _ in range(options.cores)]
    apart = sum(float(process.communicate()[0]) for process in processes)
    print(f"one process, {options.cores} threads: {together:.0f} samples/s")
    print(f"{options.cores} processes, 1 thread:  {apart:.0f} samples/s, {apart / together:.2f} times as many")


if __name__ == "__main__":
    main()
