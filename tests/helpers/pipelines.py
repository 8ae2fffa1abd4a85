"""A tiny pipeline with an adapter."""

from gligen_xl.adapter import AdapterConfig, attach
from helpers.tiny import open_gates, sdxl_pipeline

SLOTS = 4


def grounded_pipeline(open_=True):
    pipeline = sdxl_pipeline()
    attach(pipeline.unet, AdapterConfig(cross_attention_dim=40, phrase_dim=40, slots=SLOTS))
    if open_:
        open_gates(pipeline.unet)
    return pipeline
