"""Detectors of free phrases with weights that are made up."""

from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from helpers.detectors import bert_tokenizer, candidate_model, clip_tokenizer, word_model


def phrase_models():
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160})
    side = {"height": 32, "width": 32}
    words = GroundingDinoProcessor(images, bert_tokenizer())
    return {
        "grounding-dino": (word_model(GroundingDinoConfig, GroundingDinoForObjectDetection), words),
        "mm-grounding-dino": (word_model(MMGroundingDinoConfig, MMGroundingDinoForObjectDetection), words),
        "owlvit": (
            candidate_model(OwlViTConfig, OwlViTForObjectDetection),
            OwlViTProcessor(OwlViTImageProcessorPil(size=side), clip_tokenizer()),
        ),
    }
