"""Adapters on tiny U-Nets."""

import pytest
import torch

from gligen_xl.adapter import AdapterConfig
from helpers.tiny import sd15_unet, sdxl_unet

PHRASE_DIM, SLOTS = 24, 5


def config_for(unet, **settings):
    return AdapterConfig(
        cross_attention_dim=unet.config.cross_attention_dim, phrase_dim=PHRASE_DIM, slots=SLOTS, **settings
    )


def inputs(unet, grounded=True, batch=2):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    kwargs = {"encoder_hidden_states": randn(batch, 6, unet.config.cross_attention_dim)}
    sample, time = randn(batch, 4, 8, 8), torch.tensor([7, 600][:batch])
    if unet.config.addition_embed_type:
        kwargs["added_cond_kwargs"] = {"text_embeds": randn(batch, 16), "time_ids": randn(batch, 6).abs() * 64}
    if grounded:
        corners = torch.rand(batch, SLOTS, 2, 2, generator=generator).sort(dim=2).values
        mask = (torch.arange(SLOTS) < torch.tensor([[2], [4]][:batch])).float()
        tokens = {"boxes": corners.flatten(2), "masks": mask, "positive_embeddings": randn(batch, SLOTS, PHRASE_DIM)}
        kwargs["cross_attention_kwargs"] = {"gligen": tokens}
    return (sample, time), kwargs


@torch.no_grad()
def run(unet, grounded=True, **changes):
    args, kwargs = inputs(unet, grounded)
    if changes:
        kwargs["cross_attention_kwargs"] = {"gligen": kwargs["cross_attention_kwargs"]["gligen"] | changes}
    return unet(*args, **kwargs).sample


@pytest.fixture(params=[sdxl_unet, sd15_unet], ids=["sdxl", "sd15"])
def unet(request):
    return request.param()
