"""Layouts to images: each image is the same one in whatever batch it is made."""

import numpy as np
import pytest
from helpers.pipelines import grounded_pipeline

from gligen_xl import Layout
from gligen_xl.generate import generate

LAYOUTS = [
    Layout(prompt="grass", phrases=["a red circle"], boxes=[[0.1, 0.1, 0.5, 0.5]], width=16, height=16),
    Layout(prompt="sand", width=16, height=16),
    Layout(prompt="snow", phrases=["a ring"], boxes=[[0.3, 0.1, 0.9, 0.5]], width=16, height=16, seed=9),
    Layout(prompt="the sea", phrases=["a ring"], boxes=[[0.3, 0.1, 0.9, 0.5]], width=24, height=16),
    Layout(
        prompt="night", negative_prompt="sand", phrases=["a star"], boxes=[[0, 0, 1, 1]], width=24, height=16, id="n"
    ),
]


@pytest.mark.parametrize("grounded", [True, False])
def test_an_image_does_not_depend_on_its_batch(grounded):
    pipeline = grounded_pipeline()
    settings = {"num_inference_steps": 3, "beta": 1.0, "seed": 2, "grounded": grounded}
    alone = list(generate(pipeline, LAYOUTS, batch_size=1, **settings))
    together = list(generate(pipeline, LAYOUTS, batch_size=5, **settings))
    assert [image.size for image in alone] == [(layout.width, layout.height) for layout in LAYOUTS]
    for first, second in zip(alone, together, strict=True):
        difference = np.asarray(first).astype(int) - np.asarray(second)
        assert abs(difference).max() <= 1


def test_seeds():
    pipeline = grounded_pipeline()
    settings = {"num_inference_steps": 2}
    first, second = generate(pipeline, [LAYOUTS[0]] * 2, seed=4, **settings)
    (again,) = generate(pipeline, [LAYOUTS[0]], seed=5, **settings)
    assert first.tobytes() != second.tobytes()
    assert abs(np.asarray(second).astype(int) - np.asarray(again)).max() <= 1
    own, of_call = (next(iter(generate(pipeline, [LAYOUTS[2]], seed=seed, **settings))) for seed in (1, 2))
    assert own.tobytes() == of_call.tobytes()  # a layout's own seed goes before
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(generate(pipeline, LAYOUTS, batch_size=0))
