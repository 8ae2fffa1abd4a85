"""In place of a pipeline: draws exactly what is asked when it is given boxes, and nothing otherwise."""

from __future__ import annotations

import time

import torch
from PIL import Image

from gligen_xl.toyworld.layouts import background, scene_image


class Painter:
    """Of the layouts of the protocol `shapes`.

    Args:
        seconds: that each image takes.
        most: after so many images it is interrupted.
    """

    unet = torch.nn.Linear(1, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR  # anything that has a class

    def __init__(self, protocol, *, seconds=0.0, most=None):
        self.layouts = {(layout.prompt, layout.boxes): layout for layout in protocol.layouts}
        self.seconds, self.most = seconds, most
        self.calls = []  # a list of prompts and seeds each

    @property
    def made(self):
        return sum(len(call) for call in self.calls)

    def __call__(self, prompts, *, gligen_boxes=None, generator, **settings):
        if self.most is not None and self.made + len(prompts) > self.most:
            raise KeyboardInterrupt
        self.calls.append(list(zip(prompts, [g.initial_seed() for g in generator], strict=True)))
        self.settings = settings
        time.sleep(self.seconds * len(prompts))
        if gligen_boxes is None:
            by_prompt = {prompt: layout for (prompt, _), layout in self.layouts.items()}
            images = [background(by_prompt[prompt]) for prompt in prompts]
        else:
            images = [
                scene_image(self.layouts[prompt, tuple(boxes)])
                for prompt, boxes in zip(prompts, gligen_boxes, strict=True)
            ]
        return type("Output", (), {"images": images})


def noise(size, seed=0):
    """An image of random pixels."""
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())
