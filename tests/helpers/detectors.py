"""Tiny detection networks of transformers, with outputs that are made up."""

import math

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    SwinConfig,
)

WORDS = (
    "a", "man", "rides", "bicycle", "red", "trees", "stand", "behind", "him", ",", "-", "'", "s", "t", "shirt", "lamp",
    "##post",
)  # fmt: skip


TEXT_LIMIT = 24  # tokens


def bert_tokenizer():
    """BERT's own places of the special tokens and the marks: the model knows them by number."""
    vocabulary = {f"[unused{k}]": k for k in range(1100)}
    places = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 999: "!", 1012: ".", 1029: "?"}
    for place, word in (places | dict(enumerate(WORDS, start=200))).items():
        del vocabulary[f"[unused{place}]"]
        vocabulary[word] = place
    return BertTokenizer(vocab=vocabulary, model_max_length=512)


def clip_tokenizer():
    letters = [chr(k) for k in range(33, 127)] + [f"{chr(k)}</w>" for k in range(33, 127)]
    vocabulary = {token: k for k, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def word_model(config_class, model_class):
    torch.manual_seed(0)
    config = config_class(
        backbone_config=SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        num_queries=20, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, d_model=32, disable_custom_kernels=True,
        max_text_len=TEXT_LIMIT,
    )  # fmt: skip
    return model_class(config)


def candidate_model(config_class, model_class):
    torch.manual_seed(0)
    text = {"vocab_size": 190, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 188, "eos_token_id": 189}
    image = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return model_class(
        config_class(text_config=text, vision_config=image | {"num_attention_heads": 2}, projection_dim=16)
    )


class Crafted(torch.nn.Module):
    """In the place of the network: gives these outputs."""

    def __init__(self, real, logits, boxes):
        super().__init__()
        self.config, self.logits, self.boxes, self.inputs = real.config, logits, boxes, []

    def forward(self, **inputs):
        self.inputs.append(inputs)
        made = type("Outputs", (dict,), {"__getattr__": dict.__getitem__})
        logits, boxes = (value[: len(inputs["pixel_values"])] for value in (self.logits, self.boxes))
        return made(logits=logits, pred_boxes=boxes)


def logit(p):
    return math.log(p / (1 - p))
