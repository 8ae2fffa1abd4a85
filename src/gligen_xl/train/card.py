"""The model card of a published adapter: README.md, written from what is known of its training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..adapter import AdapterConfig
from ..adapter.convert import FAMILIES
from ..escape import markdown, markdown_code, printable, python_string
from ..worlds import NAMES, find_world
from .record import Row, RunRecord
from .summary import METRICS, blocks_in_words, data_in_words, duration, numbers, percent, plain, recipe_in_words

_FAMILY_TAGS = {768: "stable-diffusion", 1024: "stable-diffusion-2", 2048: "stable-diffusion-xl"}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # a base in one file
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
        gate: mean |tanh| of its gates; None where it has none.
        run: its training; an adapter by itself has none.
        images: file in the repository -> samples seen.
    """

    repository: str
    license: str
    form: AdapterConfig
    parameters: int
    about: Mapping[str, Any]
    base_model: str | None = None
    gate: float | None = None
    run: RunRecord | None = None
    images: Mapping[str, int]


def model_card(facts: CardFacts) -> str:
    """Return the card as Markdown, with its front matter."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False)  # ASCII: characters that do not show are escaped
    parts = [
        f"---\n{front}---",
        f"# {markdown(facts.repository.split('/')[-1])}",
        _what(facts),
        _measured(facts),
        _last_image(facts),
        f"## Use\n\nWith the library `gligen-xl` installed:\n\n```python\n{_code(facts)}\n```",
        _training(facts),
        _results(facts),
        _earlier_images(facts),
        _credit(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Return what the Hub reads: https://huggingface.co/docs/hub/model-cards."""
    family = _FAMILY_TAGS.get(facts.form.cross_attention_dim)
    front: dict[str, Any] = {
        "license": facts.license,
        "library_name": "gligen-xl",
        "pipeline_tag": "text-to-image",
        "tags": ["gligen", "diffusers", "layout-to-image", "grounded-generation", *filter(None, [family]), "adapter"],
    }
    if is_repository(facts.base_model):
        front |= {"base_model": facts.base_model, "base_model_relation": "adapter"}
    if data := [name for source in _sources(facts) if (name := _data_repository(source))]:
        front["datasets"] = data
    return front


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Sections -----------------------------------------------------------------------------------------------------------


def _what(facts: CardFacts) -> str:
    fusers = blocks_in_words(facts.form.blocks, facts.form.every, "transformer block")
    return (
        f"A GLIGEN adapter for {_base_in_words(facts)}. It gives the model a phrase and a box for each object of an "
        f"image. It has {facts.parameters:,} parameters, a fuser on {markdown(fusers)} of the U-Net, and "
        f"{facts.form.slots} grounding tokens an image. Nothing of the base model is in it."
    )


def _base_in_words(facts: CardFacts) -> str:
    base, training = facts.base_model, _settings(facts)
    if base in NAMES:
        return f"the tiny model of the {base} world that comes with gligen-xl (`{base}`)"
    if base and is_repository(base):
        variant = training.get("variant")
        of = f", loaded from its files of the variant {markdown_code(variant)}" if isinstance(variant, str) else ""
        return f"[{base}](https://huggingface.co/{base}){of}"
    if base:
        return f"a base model called {markdown_code(base)}, which was a file or folder where the adapter was trained"
    family = FAMILIES.get(facts.form.cross_attention_dim, "a base model")
    return f"{family} (which base model it was trained on is not recorded)"


def _measured(facts: CardFacts) -> str:
    """Return what is known of how well it works, and what is not."""
    last = facts.run.measured if facts.run else {}
    samples = numbers(facts.about).get("samples")
    lines = []
    if samples:
        lines.append(f"It has seen {samples:,.0f} samples in training.")
    elif samples == 0:
        lines.append("It has seen no sample: it was not trained.")
    else:
        lines.append("How many samples it has seen in training is not recorded.")
    if facts.gate == 0:
        lines.append(
            "Its gates are closed (mean \\|tanh α\\| is 0): it changes nothing of the base model's images, and has "
            "learned nothing yet."
        )
    elif facts.gate is not None:
        lines.append(f"Its gates are open by {plain(facts.gate)} (mean \\|tanh α\\|, from 0 closed to 1 open).")
    if (on := last.get("on_recall_50")) is not None and (off := last.get("off_recall_50")) is not None:
        judged = "more often" if on > off else "no more often"
        lines.append(
            f"Objects stood in their boxes {judged} with grounding on than with it off: {percent(on)} against "
            f"{percent(off)} (recall@0.5, of held-out layouts)."
        )
    else:
        lines.append("Whether objects stand in their boxes was not measured.")
    if (gain := last.get("grounding_gain")) is None:
        lines.append("Whether boxes help the denoising (the grounding gain) was not measured.")
    elif gain > 0:
        lines.append(f"On held-out samples the boxes take away {percent(gain)} of the loss (the grounding gain).")
    else:
        lines.append(f"On held-out samples the boxes do not lower the loss (the grounding gain is {percent(gain)}).")
    return "\n".join(f"- {line}" for line in lines)


def _code(facts: CardFacts) -> str:
    """Return a few lines of Python that use it, and run as they are if the base is on the Hub or embedded."""
    smaller = facts.form.cross_attention_dim in (768, 1024)
    name = "StableDiffusionGLIGENPipeline" if smaller else "StableDiffusionXLGLIGENPipeline"
    base, world = facts.base_model or "BASE_MODEL", find_world(facts.base_model)
    prompt, phrase = world.EXAMPLE if world else _SCENE
    single = not is_repository(base) and base.endswith(_CHECKPOINTS)
    variant = _settings(facts).get("variant")
    options = f", variant={python_string(variant)}" if isinstance(variant, str) and is_repository(base) else ""
    return "\n".join(
        [
            *([] if world else ["import torch"]),
            f"from gligen_xl import {name}",
            "",
            *([] if world or is_repository(base) else [_note(facts.base_model, single)]),
            f"pipeline = {name}.{'from_single_file' if single else 'from_pretrained'}(",
            f"    {python_string(base)}" + ("" if world else f", torch_dtype=torch.float16{options}"),
            ")" if world else ').to("cuda")',
            f"pipeline.load_gligen_adapter({python_string(facts.repository)})",
            "image = pipeline(",
            f'    "{prompt}", gligen_phrases=["{phrase}"], gligen_boxes=[[0.1, 0.5, 0.5, 0.9]]',
            ").images[0]  # boxes are x0, y0, x1, y1 from the top left, 0 to 1",
        ]
    )


def _note(base: str | None, single: bool) -> str:
    if base is None:
        return "# BASE_MODEL: a folder, or a repository of the Hub, with a model of this family"
    return f"# {printable(base)}: a {'file' if single else 'folder'} with the model that it was trained on"


def _training(facts: CardFacts) -> str:
    training = _settings(facts)
    rows = []
    if _sources(facts):
        rows.append(("Data", markdown(data_in_words(training.get("data")))))
    if start := training.get("init_adapter"):
        rows.append(("Began from", markdown_code(start, cell=True)))
    if (samples := numbers(facts.about).get("samples")) is not None:
        whole, batch = int(numbers(training).get("samples", 0)), _batch(training)
        of = f" of {whole:,} planned" if whole // batch * batch > samples else ""
        rows.append(("Samples seen", f"{samples:,.0f}{of}, in batches of {batch}"))
    if facts.run and facts.run.seconds:
        speed = facts.run.samples / facts.run.seconds
        rows.append(("Time in training steps", f"{duration(facts.run.seconds)} ({speed:.3g} samples/s)"))
    if facts.run and facts.run.skipped:
        rows.append(("Steps left out as not finite", f"{len(facts.run.skipped):,}"))
    if training:
        rows.append(("Recipe", markdown(recipe_in_words(training))))
    if origin := facts.about.get("converted_from"):
        rows.append(("Converted from", markdown_code(origin, cell=True)))
    if isinstance(versions := facts.about.get("versions"), Mapping) and versions:
        rows.append(("Made with", markdown(", ".join(f"{name} {number}" for name, number in versions.items()))))
    if not rows:
        return ""
    more = "\n\nEvery setting stands in `gligen_adapter.json`, under `training`." if training else ""
    return f"## Training\n\n{table(('', ''), rows).replace('---:', '---')}{more}"


def _results(facts: CardFacts) -> str:
    last = facts.run.measured if facts.run else {}
    validation = _settings(facts).get("validation")
    count = numbers(validation).get("pictures")
    detector = validation.get("detector") if isinstance(validation, Mapping) else None
    layouts = f"{count:.0f} held-out layouts" if count else "held-out layouts"
    parts = [_on_and_off(last, layouts, f"the detector {markdown_code(detector)}" if detector else "a detector")]
    rows = [(name, write(last[key])) for key, (name, write) in _GROUNDING_METRICS.items() if key in last]
    if rows:
        parts.append("On held-out samples, with the same noise:\n\n" + table(("", "value"), rows))
    parts = [part for part in parts if part]
    return "## How well boxes are followed\n\n" + "\n\n".join(parts) if parts else ""


def _on_and_off(last: Row, layouts: str, detector: str) -> str:
    names = [key.removeprefix("on_") for key in last if key.startswith("on_")]
    if not names:
        return ""
    rows = []
    for name in names:
        write = plain if name.startswith("mean_iou") else percent
        label = METRICS.get(name) or markdown(name.replace("_", " ").capitalize())
        cells = [write(last[f"{side}_{name}"]) if f"{side}_{name}" in last else "" for side in ("on", "off")]
        rows.append((label, *cells))
    return f"Images of {layouts}, looked at by {detector}:\n\n{table(('', 'grounding on', 'off'), rows)}"


def _last_image(facts: CardFacts) -> str:
    if not facts.images:
        return ""
    file, samples = list(facts.images.items())[-1]
    caption = (
        f"*Held-out layouts after {samples:,} samples, grounding on and off from the same noise; boxes are drawn.*"
    )
    return f"![Layouts with grounding on and off]({file})\n\n{caption}"


def _earlier_images(facts: CardFacts) -> str:
    earlier = list(facts.images.items())[:-1]
    shown = "\n\n".join(
        f"After {samples:,} samples:\n\n![After {samples:,} samples]({file})" for file, samples in earlier
    )
    return f"## Before\n\n{shown}" if earlier else ""


def _credit(facts: CardFacts) -> str:
    lines = ["## Credit", _CREDIT]
    if is_repository(facts.base_model):
        lines.append(f"The licence of the base model, `{facts.base_model}`, holds for what is made with both.")
    return "\n\n".join(lines)


# Small parts --------------------------------------------------------------------------------------------------------


def _settings(facts: CardFacts) -> dict[str, Any]:
    settings = facts.about.get("training") or (facts.run.config if facts.run else {})
    return settings if isinstance(settings, dict) else {}


def is_repository(name: Any) -> bool:
    """Tell whether it is the name of a repository of the Hub, so that it may stand in a link and in code as it is."""
    return isinstance(name, str) and bool(_REPOSITORY.fullmatch(name))


def _batch(training: Mapping[str, Any]) -> int:
    return max(int(numbers(training).get("batch_size") or 1), 1)


def _sources(facts: CardFacts) -> list[str]:
    data = _settings(facts).get("data")
    return [data] if isinstance(data, str) else list(data) if isinstance(data, Mapping) else []


def _data_repository(source: str) -> str | None:
    """hf://datasets/OWNER/NAME/FOLDER -> OWNER/NAME."""
    start = "hf://datasets/"
    name = "/".join(source.removeprefix(start).split("/")[:2]).split("@")[0]
    return name if source.startswith(start) and is_repository(name) else None
