"""Weights with the names that GLIGEN's own files give them."""

import re

import torch

from gligen_xl.adapter import AdapterConfig, attach
from helpers.tiny import open_gates, sd15_unet


def original_name(name):
    """diffusers' name -> the original latent diffusion code's, for two layers a block."""
    if match := re.fullmatch(r"conv_in\.(\w+)", name):
        return f"input_blocks.0.0.{match[1]}"
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.*)", name):
        return f"middle_block.1.{match[1]}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.*)", name):
        down = match[1] == "down"
        number = 3 * int(match[2]) + int(match[3]) + down
        return f"{'input' if down else 'output'}_blocks.{number}.1.{match[4]}"
    return name


def grounded_unet(make=sd15_unet, **config):
    unet = make(layers_per_block=2)
    width = unet.config.cross_attention_dim
    attach(unet, AdapterConfig(cross_attention_dim=width, phrase_dim=width, **config))
    open_gates(unet)
    return unet


def same(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
