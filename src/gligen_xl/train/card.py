"""The model card of a published adapter: README.md, written from what is known of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..adapter import AdapterConfig
from ..hub import names_repository
from .record import Row, RunRecord
from .summary import METRICS, blocks_in_words, data_in_words, duration, percent, plain, recipe_in_words

_SMALLER_BASES = {768: "stable-diffusion", 1024: "stable-diffusion-2"}  # cross-attention width -> tag
_SHAPES = ("grass with a red circle", "a red circle")
_SCENE = ("a photo of a meadow with a dog", "a dog")
_GROUNDING_METRICS = {
    "grounding_gain": ("Grounding gain: share of the held-out loss that the boxes take away", percent),
    "grounding_gain_q1": ("the same, least noisy quarter of the timesteps", percent),
    "grounding_gain_q2": ("second quarter", percent),
    "grounding_gain_q3": ("third quarter", percent),
    "grounding_gain_q4": ("noisiest quarter", percent),
    "loss": ("Held-out loss with boxes", plain),
    "loss_no_boxes": ("Held-out loss without", plain),
    "gate_mean": ("Mean gate, \\|tanh α\\|", plain),
}


_CREDIT = """\
The method is [GLIGEN: Open-Set Grounded Text-to-Image Generation](https://arxiv.org/abs/2301.07093) (Li et al., CVPR
2023). Grounding for SDXL was first trained as IGLIGEN-XL, with [InteractDiffusion](https://arxiv.org/abs/2312.05849)
(Hoe et al., CVPR 2024), after IGLIGEN of [LLM-grounded Diffusion](https://arxiv.org/abs/2305.13655) (Lian et al., TMLR
2024)."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is written from. Names in it are public: nothing of the machine is left.

    Args:
        repository: owner/name on the Hub.
        license: as the Hub names it.
        form: of the adapter.
        parameters: how many it has.
        about: what its description says beside its form: base model, training, versions.
        base_model: a repository of the Hub, "shapes", or the bare name of what lay on a disk.
        run: its training; an adapter by itself has none.
        pictures: file in the repository -> samples seen.
    """

    repository: str
    license: str
    form: AdapterConfig
    parameters: int
    about: Mapping[str, Any]
    base_model: str | None = None
    run: RunRecord | None = None
    pictures: Mapping[str, int]


def model_card(facts: CardFacts) -> str:
    """The card as Markdown, with its front matter."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {facts.repository.split('/')[-1]}",
        _what(facts),
        _last_picture(facts),
        f"## Use\n\nWith the library `gligen-xl` installed:\n\n```python\n{_code(facts)}\n```",
        _training(facts),
        _results(facts),
        _earlier_pictures(facts),
        _credit(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """What the Hub reads: https://huggingface.co/docs/hub/model-cards."""
    family = _SMALLER_BASES.get(facts.form.cross_attention_dim, "stable-diffusion-xl")
    front: dict[str, Any] = {
        "license": facts.license,
        "library_name": "gligen-xl",
        "pipeline_tag": "text-to-image",
        "tags": ["gligen", "diffusers", "layout-to-image", "grounded-generation", family, "adapter"],
    }
    if names_repository(facts.base_model or ""):
        front |= {"base_model": facts.base_model, "base_model_relation": "adapter"}
    if data := [name for source in _sources(facts) if (name := _data_repository(source))]:
        front["datasets"] = data
    return front


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Sections -----------------------------------------------------------------------------------------------------------


def _what(facts: CardFacts) -> str:
    base = facts.base_model or "its base model"
    named = f"[{base}](https://huggingface.co/{base})" if names_repository(base) else f"`{base}`"
    fusers = blocks_in_words(facts.form.blocks, facts.form.every, "transformer block")
    return (
        f"A GLIGEN adapter for {named if facts.base_model else base}: objects stand where you draw them, a phrase for "
        f"each box. It has {facts.parameters:,} parameters, a fuser on {fusers} of the U-Net, and {facts.form.slots} "
        "grounding tokens a picture. Nothing of the base model is in it."
    )


def _code(facts: CardFacts) -> str:
    """How to use it: a few lines of Python that run as they stand, where the base is on the Hub or embedded."""
    smaller = facts.form.cross_attention_dim in _SMALLER_BASES
    name = "StableDiffusionGLIGENPipeline" if smaller else "StableDiffusionXLGLIGENPipeline"
    base, shapes = facts.base_model or "BASE_MODEL", facts.base_model == "shapes"
    prompt, phrase = _SHAPES if shapes else _SCENE
    found = shapes or names_repository(base)
    return "\n".join(
        [
            *([] if shapes else ["import torch"]),
            f"from gligen_xl import {name}",
            "",
            *([] if found else [f"# {base}: a folder with the model that it was trained on"]),
            f"pipeline = {name}.from_pretrained(",
            f'    "{base}"' if shapes else f'    "{base}", torch_dtype=torch.float16',
            ")" if shapes else ').to("cuda")',
            f'pipeline.load_gligen_adapter("{facts.repository}")',
            "image = pipeline(",
            f'    "{prompt}", gligen_phrases=["{phrase}"], gligen_boxes=[[0.1, 0.5, 0.5, 0.9]]',
            ").images[0]  # boxes are x0, y0, x1, y1 from the top left, 0 to 1",
        ]
    )


def _training(facts: CardFacts) -> str:
    training = _settings(facts)
    rows = []
    if sources := _sources(facts):
        rows.append(("Data", data_in_words(training.get("data")) if training else ", ".join(sources)))
    if start := training.get("init_adapter"):
        rows.append(("Began from", f"`{start}`"))
    if samples := facts.about.get("samples"):
        whole = training.get("samples")
        of = f" of {whole:,} planned" if whole and whole // _batch(training) * _batch(training) > samples else ""
        rows.append(("Samples seen", f"{samples:,}{of}, in batches of {_batch(training)}"))
    if facts.run and facts.run.seconds:
        speed = facts.run.samples / facts.run.seconds
        rows.append(("Time in training steps", f"{duration(facts.run.seconds)} ({speed:.3g} samples/s)"))
    if facts.run and facts.run.skipped:
        rows.append(("Steps left out as not finite", f"{len(facts.run.skipped):,}"))
    if training:
        rows.append(("Recipe", recipe_in_words(training)))
    if origin := facts.about.get("converted_from"):
        rows.append(("Converted from", f"`{origin}`"))
    if versions := facts.about.get("versions"):
        rows.append(("Made with", ", ".join(f"{name} {number}" for name, number in versions.items())))
    if not rows:
        return ""
    cells = [(name, _cell(value)) for name, value in rows]
    more = "\n\nEvery setting stands in `gligen_adapter.json`, under `training`." if training else ""
    return f"## Training\n\n{table(('', ''), cells).replace('---:', '---')}{more}"


def _results(facts: CardFacts) -> str:
    last = facts.run.measured if facts.run else {}
    count = (_settings(facts).get("validation") or {}).get("pictures")
    parts = [_on_and_off(last, f"{count} held-out layouts" if count else "held-out layouts")]
    rows = [(name, write(last[key])) for key, (name, write) in _GROUNDING_METRICS.items() if key in last]
    if rows:
        parts.append("On held-out samples, with the same noise:\n\n" + table(("", "value"), rows))
    parts = [part for part in parts if part]
    return "## How well boxes are followed\n\n" + "\n\n".join(parts) if parts else ""


def _on_and_off(last: Row, layouts: str) -> str:
    names = [key.removeprefix("on_") for key in last if key.startswith("on_")]
    if not names:
        return ""
    rows = []
    for name in names:
        write = plain if name.startswith("mean_iou") else percent
        label = METRICS.get(name, name.replace("_", " ").capitalize())
        cells = [write(last[f"{side}_{name}"]) if f"{side}_{name}" in last else "" for side in ("on", "off")]
        rows.append((label, *cells))
    return f"Pictures of {layouts}, looked at by a detector:\n\n{table(('', 'grounding on', 'off'), rows)}"


def _last_picture(facts: CardFacts) -> str:
    if not facts.pictures:
        return ""
    file, samples = list(facts.pictures.items())[-1]
    caption = (
        f"*Held-out layouts after {samples:,} samples, grounding on and off from the same noise; boxes are drawn.*"
    )
    return f"![Layouts with grounding on and off]({file})\n\n{caption}"


def _earlier_pictures(facts: CardFacts) -> str:
    earlier = list(facts.pictures.items())[:-1]
    shown = "\n\n".join(
        f"After {samples:,} samples:\n\n![After {samples:,} samples]({file})" for file, samples in earlier
    )
    return f"## Before\n\n{shown}" if earlier else ""


def _credit(facts: CardFacts) -> str:
    lines = ["## Credit", _CREDIT]
    if names_repository(facts.base_model or ""):
        lines.append(f"The licence of the base model, `{facts.base_model}`, holds for what is made with both.")
    return "\n\n".join(lines)


# Small parts --------------------------------------------------------------------------------------------------------


def _settings(facts: CardFacts) -> dict[str, Any]:
    settings = facts.about.get("training") or (facts.run.config if facts.run else {})
    return settings if isinstance(settings, dict) else {}


def _batch(training: Mapping[str, Any]) -> int:
    return training.get("batch_size") or 1


def _sources(facts: CardFacts) -> list[str]:
    data = _settings(facts).get("data") or []
    return [data] if isinstance(data, str) else list(data)


def _data_repository(source: str) -> str | None:
    """hf://datasets/OWNER/NAME/FOLDER -> OWNER/NAME."""
    start = "hf://datasets/"
    parts = source.removeprefix(start).split("/")
    return "/".join(parts[:2]).split("@")[0] if source.startswith(start) and len(parts) > 1 else None


def _cell(text: str) -> str:
    """Text that stays within one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
