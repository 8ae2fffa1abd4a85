"""Phrase embeddings: which encoder outputs, and that padding does not matter."""

import pytest
import torch
from helpers.tiny import sdxl_pipeline, tokenizer

from gligen_xl.text_embeddings import embed_phrases, phrase_width

PHRASES = ["a red circle", "a small yellow star at the top left", "ring", "a red circle"]


@pytest.fixture(scope="module")
def parts():
    pipeline = sdxl_pipeline()
    return [pipeline.tokenizer, pipeline.tokenizer_2], [pipeline.text_encoder, pipeline.text_encoder_2]


def test_padding_to_the_longest_equals_padding_to_the_limit(parts):
    tokenizers, encoders = parts
    full = tokenizer()(PHRASES, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = torch.cat([encoders[0](full).pooler_output, encoders[1](full).text_embeds], dim=-1)
    got = embed_phrases(PHRASES, tokenizers, encoders)
    assert got.shape == (4, phrase_width(encoders)) == expected.shape
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_phrase_does_not_depend_on_its_company(parts):
    together = embed_phrases(PHRASES, *parts)
    torch.testing.assert_close(embed_phrases(PHRASES[2:3], *parts), together[2:3], atol=1e-5, rtol=0)
    assert torch.equal(together[0], together[3])
    assert (together[0] - together[1]).abs().max() > 0.01


def test_a_phrase_that_is_too_long_says_so(parts):
    with pytest.warns(UserWarning, match="longer than"):
        embed_phrases(["ring " * 80], *parts)


def test_nothing_to_embed(parts):
    with pytest.raises(ValueError, match="no phrases"):
        embed_phrases([], *parts)
