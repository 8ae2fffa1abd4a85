"""The arguments of a call as `inspect`, `help()` and editors show them: diffusers' own first, then ours by name."""

import inspect
import json
import pydoc
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from helpers.tiny import grounded, sd_pipeline, sdxl_pipeline

import gligen_xl
from gligen_xl.pipelines import GroundingMixin
from gligen_xl.pipelines.auto import CLASSES
from gligen_xl.pipelines.export import export_pipeline

OURS = [
    "gligen_phrases", "gligen_boxes", "gligen_layouts", "gligen_phrase_embeds", "gligen_scheduled_sampling_beta",
    "gligen_inpaint_image", "strict",
]  # fmt: skip
every_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=lambda kind: kind.__name__)


def plain(kind):
    return getattr(diffusers, kind.__name__.replace("GLIGEN", ""))


def check_merged(signature, theirs, ours):
    """diffusers' parameters as they are and where they are, ours between them and **kwargs."""
    got, expected = list(signature.parameters.values()), list(theirs.parameters.values())
    further = [one for one in expected if one.kind is inspect.Parameter.VAR_KEYWORD]
    own = [one for one in expected if one not in further]
    assert got[: len(own)] == own
    assert got[len(got) - len(further) :] == further
    between = got[len(own) : len(got) - len(further)]
    assert [one.name for one in between] == ours
    assert {one.kind for one in between} == {inspect.Parameter.KEYWORD_ONLY}


@every_class
def test_diffusers_arguments_come_first_and_ours_by_name(kind):
    check_merged(inspect.signature(kind.__call__), inspect.signature(plain(kind).__call__), OURS)


@every_class
def test_of_a_pipeline_that_is_loaded(kind):
    bare = kind.__new__(kind)
    expected = [name for name in inspect.signature(kind.__call__).parameters if name != "self"]
    assert list(inspect.signature(bare).parameters) == expected
    assert list(inspect.signature(bare.__call__).parameters) == expected
    assert expected[:1] == ["prompt"]


@every_class
def test_help_tells_of_both(kind):
    text = pydoc.plain(pydoc.render_doc(kind.__call__))
    for words in ("gligen_phrase_embeds", "gligen_boxes: nested like the phrases", "num_inference_steps (`int`"):
        assert words in text
    assert inspect.getdoc(plain(kind).__call__) in kind.__call__.__doc__
    assert kind.__call__.__name__ == "__call__"


@every_class
def test_defaults_are_those_of_diffusers(kind):
    theirs = inspect.signature(plain(kind).__call__).parameters
    ours = inspect.signature(kind.__call__).parameters
    assert {name: ours[name].default for name in theirs} == {name: one.default for name, one in theirs.items()}
    assert ours["gligen_scheduled_sampling_beta"].default == 0.3


def test_a_subclass_keeps_it_and_one_of_ones_own_gets_it():
    class Mine(gligen_xl.StableDiffusionXLGLIGENPipeline):
        pass

    class Other(GroundingMixin, diffusers.StableDiffusionImg2ImgPipeline):
        pass

    class Further(gligen_xl.StableDiffusionXLGLIGENPipeline):
        def __call__(self, prompt, *, mine=1):
            return mine

    assert Mine.__call__ is gligen_xl.StableDiffusionXLGLIGENPipeline.__call__
    theirs = inspect.signature(diffusers.StableDiffusionImg2ImgPipeline.__call__)
    check_merged(inspect.signature(Other.__call__), theirs, OURS)
    assert list(inspect.signature(Further.__call__).parameters) == ["self", "prompt", "mine"]


def test_what_is_unknown_is_refused_and_all_that_is_known_is_named():
    pipeline = grounded(sdxl_pipeline())
    with pytest.raises(TypeError, match=r"unknown arguments \['gligen_phrase'\]") as error:
        pipeline("grass", gligen_phrase=["a ring"])
    shown = str(error.value)
    assert all(name in shown for name in ("num_inference_steps", *OURS))
    assert "kwargs" not in shown.split("takes")[1].split(", ")


@pytest.mark.parametrize("make", [sdxl_pipeline, sd_pipeline])
def test_an_exported_folder_shows_them_too(make, tmp_path):
    pipeline = grounded(make())
    export_pipeline(pipeline, tmp_path / "exported")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert not isinstance(loaded, GroundingMixin)
    theirs = inspect.signature(plain(type(pipeline)).__call__)
    ours = ["gligen_phrases", "gligen_boxes", "gligen_phrase_embeds", "gligen_scheduled_sampling_beta"]
    check_merged(inspect.signature(type(loaded).__call__), theirs, ours)
    assert "gligen_boxes" in type(loaded).__call__.__doc__


@every_class
def test_from_pipe_and_signatures_of_the_constructor_are_diffusers_own(kind):
    assert inspect.signature(kind.__init__) == inspect.signature(plain(kind).__init__)
    assert kind._get_signature_keys(kind) == plain(kind)._get_signature_keys(plain(kind))


def test_from_pipe_goes_from_class_to_class():
    pipeline = grounded(sdxl_pipeline())
    other = gligen_xl.StableDiffusionXLGLIGENImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(pipeline)
    assert gligen_xl.StableDiffusionXLGLIGENPipeline.from_pipe(theirs).unet is pipeline.unet


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright", path=str(Path(sys.executable).parent)) is None, reason="pyright is absent")
def test_a_type_checker_sees_both(tmp_path):
    """What an editor completes from: diffusers' parameters, and ours in the second overload."""
    lines = ["import gligen_xl", "def use("]
    lines += [f"    p{k}: gligen_xl.{kind.__name__}," for k, kind in enumerate(CLASSES.values())]
    lines += ["):", *(f"    reveal_type(p{k}.__call__)" for k in range(len(CLASSES)))]
    lines += ["    p0('a', height=8, gligen_phrases=['a'], gligen_boxes=[[0, 0, 1, 1]])", "    p0(3)"]
    (tmp_path / "use.py").write_text("\n".join(lines))
    command = [Path(sys.executable).with_name("pyright"), "--outputjson", "--pythonpath", sys.executable, "use.py"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    found = json.loads(shown)["generalDiagnostics"]
    types = [one["message"] for one in found if one["severity"] == "information"]
    assert len(types) == len(CLASSES)
    assert all("GroundedCall[" in one and "num_inference_steps: int" in one for one in types)
    wrong = {one["range"]["start"]["line"] for one in found if one["severity"] == "error"}
    assert wrong == {len(lines) - 1}  # a number is no prompt


def test_nothing_is_changed_by_the_way_of_calling():
    pipeline = grounded(sdxl_pipeline())
    call = {
        "gligen_phrases": ["a ring"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]], "num_inference_steps": 2,
        "output_type": "latent", "height": 16, "width": 16,
    }  # fmt: skip

    def draw(call, *given, **named):
        return call(*given, generator=torch.Generator().manual_seed(0), **named).images

    expected = draw(pipeline, "grass", **call)
    assert torch.equal(draw(pipeline.__call__, prompt="grass", **call), expected)
    assert torch.equal(draw(type(pipeline).__call__, pipeline, "grass", **call), expected)
    rest = {name: value for name, value in call.items() if name not in ("height", "width")}
    assert torch.equal(draw(pipeline, "grass", None, 16, 16, **rest), expected)
