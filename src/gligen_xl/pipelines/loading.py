"""Pipelines and their adapters in folders and on the Hub; the part of the mixin that is not about one call."""

from __future__ import annotations

import tempfile
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from ..adapter import (
    AdapterConfig,
    adapter_config,
    adopt_gated,
    attach,
    detach,
    detached,
    is_attached,
    is_gated,
    load_adapter,
    reattach,
    save_adapter,
    set_adapter_scale,
    set_slots,
)
from ..adapter.convert import holds_adapter, read_published
from ..adapter.io import CONFIG_NAME, weights_name
from ..adapter.pickles import settings_ignored
from ..hub import INDEX_NAME, OPTIONS, check_variant, local_folder, pipeline_files, upload
from ..io import read_json, write_json
from ..redact import clean_model_folder
from ..text_embeddings import phrase_width
from ..worlds import find_world
from .parts import check_parts, check_tokenizers, naming_part, read_index
from .weights import check_loaded, check_shards, check_values, lacks, misfit, without_values

ADAPTER_SUBFOLDER = "gligen_adapter"
_parts_stay: ContextVar[bool] = ContextVar("parts_stay", default=False)  # while from_pipe makes a pipeline of them
SLOTS_SETTING = "gligen_slots"  # in the index of an exported pipeline; its gated U-Net's own file cannot say it


class AdapterLoaderMixin(DiffusionPipeline):
    """A diffusers pipeline whose U-Net may carry a GLIGEN adapter."""

    def register_modules(self, **modules: Any) -> None:
        """diffusers' own. An adapter that diffusers built into the U-Net becomes ours, whichever way it came in."""
        super().register_modules(**modules)
        unet: Any = modules.get("unet")
        if hasattr(unet, "config") and is_gated(unet):
            # Nine channels are GLIGEN's own inpainting form, unless the pipeline itself knows what to put into them.
            adopt_gated(unet, inpaint=unet.config["in_channels"] == 9 and "Inpaint" not in type(self).__name__)

    # The adapter ------------------------------------------------------------------------------------------------

    def load_gligen_adapter(
        self,
        source: str | Path,
        *,
        subfolder: str | None = None,
        weight_name: str | None = None,
        variant: str | None = None,
        **hub: Any,
    ) -> AdapterConfig:
        """Attach the adapter of a folder or Hub repository, in place of one that is there, which stays on any error.

        Its scale is 1 again, whatever that of the former one was.

        Args:
            subfolder: where in the folder or repository it lies.
            weight_name: of the weights' file, where it is not `gligen_adapter.safetensors`.
            variant: as fp16, for `gligen_adapter.fp16.safetensors`.
            hub: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged, or for another base: which tensor does not fit.
        """
        former = detach(self.unet) if is_attached(self.unet) else None
        try:
            config = load_adapter(
                self.unet, source, subfolder=subfolder, weight_name=weight_name, variant=variant, **hub
            )
            try:
                self._check_phrase_width(config, str(source))
            except BaseException:
                detach(self.unet)
                raise
        except BaseException:
            if former is not None:
                reattach(self.unet, former)
            raise
        return config

    def save_gligen_adapter(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write the adapter alone, as safetensors, to be loaded onto any model of this base family.

        Args:
            dtype: to save in, torch.float32, torch.bfloat16 or torch.float16; as it is by default.
            variant: put into the weights' name, as fp16.
            push_to_hub: upload the folder, to `repo_id` or a repository of the folder's name.
            hub: repo_id, private, token, commit_message, create_pr, revision.
        """
        if hub and not push_to_hub:
            raise TypeError(f"{sorted(hub)} are for push_to_hub=True")
        save_adapter(self.unet, folder, dtype=dtype, variant=variant)
        if push_to_hub:
            files = [CONFIG_NAME, weights_name(variant)]  # and nothing else that may lie there
            name = hub.pop("repo_id", Path(folder).resolve().name)
            upload(folder, name, "Upload a GLIGEN adapter", allow_patterns=files, **hub)

    def unload_gligen_adapter(self) -> None:
        """Take the adapter off; the pipeline is the plain one again."""
        detach(self.unet)

    def set_gligen_adapter_scale(self, scale: float) -> None:
        """Multiply the adapter's gates: 1 as trained, 0 off."""
        set_adapter_scale(self.unet, scale)

    def _text_parts(self) -> tuple[list[Any], list[Any]]:
        """The tokenizers and text encoders that are there in pairs."""
        pairs = [
            (getattr(self, f"tokenizer{number}", None), getattr(self, f"text_encoder{number}", None))
            for number in ("", "_2")
        ]
        there = [pair for pair in pairs if None not in pair]
        return [tokenizer for tokenizer, _ in there], [encoder for _, encoder in there]

    def _expected_encoders(self) -> list[str]:
        return [name for name in ("text_encoder", "text_encoder_2") if name in self.config]

    def _check_phrase_width(self, config: AdapterConfig, source: str) -> None:
        encoders = self._text_parts()[1]
        if len(encoders) == len(self._expected_encoders()) and (width := phrase_width(encoders)) != config.phrase_dim:
            raise ValueError(
                f"{source} reads phrase embeddings of width {config.phrase_dim}, these text encoders give {width}: "
                "it was trained on another base model"
            )

    # Folders ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any):  # type: ignore[override]
        """Load a pipeline folder or Hub repository, with its adapter where it has one.

        Understood are an ordinary pipeline, one with an adapter in the subfolder `gligen_adapter`, one whose U-Net was
        saved with `attention_type="gated"` (as `jiuntian/gligen-xl-1024`), and the name "shapes", the embedded model.
        Code that lies in a repository is never run.

        Args:
            kwargs: those of diffusers' `from_pretrained`; `dtype` (or `torch_dtype`) is float32 by default.
        """
        if kwargs.pop("trust_remote_code", False):
            warnings.warn("trust_remote_code is ignored: code of a repository is never run", stacklevel=2)
        # One type for all parts: left to itself, transformers keeps the files' type and diffusers does not.
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or torch.float32)
        folder = pipeline_folder(pretrained_model_name_or_path, kwargs)
        index = read_index(folder)
        check_parts(folder, index, kwargs)
        if "Inpaint" in cls.__name__ and "unet" not in kwargs and _is_gligen_inpainting(folder, index):
            raise ValueError(
                f"the nine channels of {folder}'s U-Net are GLIGEN's own, not those of {cls.__name__}; load it with "
                "StableDiffusionGLIGENPipeline and give gligen_inpaint_image"
            )
        variant = kwargs.get("variant")
        parts = [name for name in index if name not in kwargs and (folder / name).is_dir()]
        check_shards(folder, parts, variant)
        try:
            with naming_part(folder):
                pipeline = super().from_pretrained(str(folder), **kwargs)
        except SafetensorError as error:  # transformers does not say of which file
            damaged = ", ".join(map(str, filter(_is_damaged, sorted(folder.rglob("*.safetensors"))))) or folder
            raise ValueError(f"{damaged}: damaged or not a safetensors file: {error}") from error
        except (RuntimeError, ValueError) as error:
            if (reason := misfit(folder, index, parts, variant)) is not None:
                raise ValueError(reason) from error
            if "this gated U-Net" in str(error):
                raise ValueError(str(error).replace("this gated U-Net", str(folder / "unet"))) from error
            raise
        check_loaded(pipeline, folder, parts, variant)
        names = ("tokenizer", "tokenizer_2")
        check_tokenizers(folder, {name: getattr(pipeline, name, None) for name in names if name not in kwargs})
        adapter = folder / ADAPTER_SUBFOLDER
        if pipeline.unet is None:
            return pipeline
        if (adapter / CONFIG_NAME).is_file() and not is_attached(pipeline.unet):
            has_variant = variant and (adapter / weights_name(variant)).is_file()
            pipeline.load_gligen_adapter(adapter, variant=variant if has_variant else None)
        elif is_attached(pipeline.unet) and "unet" not in kwargs:
            set_slots(pipeline.unet, index.get(SLOTS_SETTING, adapter_config(pipeline.unet).slots))
        return pipeline

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **kwargs: Any):
        """diffusers' own: a checkpoint in one file. One that holds an adapter, as GLIGEN's own, is loaded with it.

        Raises:
            ValueError: it lacks a tensor; or its adapter is not whole.
        """
        file = Path(pretrained_model_link_or_path)
        if not file.is_file():
            return super().from_single_file(str(pretrained_model_link_or_path), **kwargs)  # type: ignore[misc]
        try:
            with settings_ignored(file):
                pipeline = super().from_single_file(str(file), **kwargs)  # type: ignore[misc]
        except NotImplementedError as error:
            if missing := without_values(error):
                raise ValueError(lacks(file, missing)) from error
            raise
        check_values(pipeline, file)
        if "unet" not in kwargs and not is_attached(pipeline.unet) and holds_adapter(file):
            config, state, about = read_published(file)
            attach(pipeline.unet, config, about=about, state=state, source=str(file))
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):  # type: ignore[override]
        """diffusers' own: a pipeline of this class over the parts of another, adapter included.

        The parts keep their types, which may differ; diffusers casts all of them to one, unless `dtype` says so here.
        """
        former_name = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or former_name
        slots = pipeline.config.get(SLOTS_SETTING) if is_gated(getattr(pipeline, "unet", None)) else None
        token = _parts_stay.set(dtype is None)
        try:
            made = super().from_pipe(pipeline, dtype=dtype, **kwargs)
        finally:
            _parts_stay.reset(token)
        if slots is not None:  # of a folder of `gligen-xl export`, loaded by its own file
            set_slots(made.unet, slots)
        return made

    def to(self, *args: Any, **kwargs: Any):
        return self if _parts_stay.get() else super().to(*args, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' own; a class named together with a file of the repository is read as the class alone."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        config.pop(SLOTS_SETTING, None)
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the plain pipeline, which diffusers loads too, and the adapter in its subfolder beside it.

        Args:
            kwargs: those of diffusers' `save_pretrained`. With push_to_hub=True the whole folder is uploaded.
        """
        push, hub = kwargs.pop("push_to_hub", False), {}
        if push:
            names = ("repo_id", "private", "token", "commit_message", "create_pr", "revision")
            hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        with detached(self.unet):
            super().save_pretrained(save_directory, **kwargs)
        index = Path(save_directory) / INDEX_NAME
        plain = next(base for base in type(self).__mro__ if base.__module__.startswith("diffusers."))
        write_json(index, {**read_json(index), "_class_name": plain.__name__})
        clean_model_folder(save_directory)
        adapter = Path(save_directory) / ADAPTER_SUBFOLDER
        if is_attached(self.unet):
            save_adapter(self.unet, adapter, variant=kwargs.get("variant"))
        elif (adapter / CONFIG_NAME).is_file():  # of a former pipeline; without its description it is not loaded
            (adapter / CONFIG_NAME).replace(adapter / f"{CONFIG_NAME}.former")
            warnings.warn(f"the adapter in {adapter} is not this pipeline's; it stays, as .former", stacklevel=2)
        if push:
            upload(save_directory, hub.pop("repo_id", Path(save_directory).name), "Upload a pipeline", **hub)

    def push_to_hub(self, repo_id: str, *, safe_serialization: bool = True, variant: str | None = None, **hub: Any):  # type: ignore[override]
        """Upload the plain pipeline and the adapter beside it, as `save_pretrained` writes them.

        Args:
            hub: private, token, commit_message, create_pr, revision.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return upload(folder, repo_id, "Upload a pipeline", **hub)


def pipeline_folder(name: str | Path, kwargs: dict[str, Any]) -> Path:
    """The pipeline's folder on this machine; what is fetched from the Hub holds no code."""
    if world := find_world(name):
        return world.model_folder()
    if Path(name).is_file():
        raise ValueError(f"{name} is a file; a checkpoint in one file is loaded with from_single_file")
    hub = {option: kwargs.pop(option) for option in OPTIONS if option in kwargs}

    def choose(files: list[str], root: Path) -> list[str]:
        # There may be former versions beside the parts; and a part that is given, or left out, is not fetched.
        index = read_json(root / INDEX_NAME) if (root / INDEX_NAME).is_file() else {}
        parts = {ADAPTER_SUBFOLDER, *index} - set(kwargs)
        own = [file for file in files if file == INDEX_NAME or file.split("/")[0] in parts]
        check_variant(own, variant, name, parts - {ADAPTER_SUBFOLDER})
        chosen, adapter = pipeline_files(own, variant), f"{ADAPTER_SUBFOLDER}/gligen_adapter"
        if not any(file.startswith(adapter) and file.endswith(".safetensors") for file in chosen):
            chosen += [file for file in own if file.startswith(adapter)]  # of one variant alone
        return chosen

    def refuse_early(files: list[str]) -> None:
        given = {file for file in files if file.split("/")[0] in kwargs}
        if variant is not None:
            check_variant([file for file in files if file not in given], variant, name)

    variant = kwargs.get("variant")
    folder = local_folder(name, "pipeline", choose, check=refuse_early, **hub)
    if not (folder / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{folder} is not a pipeline folder: it has no {INDEX_NAME}")
    index = read_json(folder / INDEX_NAME)
    if not isinstance(index, dict):
        raise ValueError(f"{folder / INDEX_NAME} holds a {type(index).__name__}; expected the parts of a pipeline")
    there = [f"{part}/{path.name}" for part in index if (folder / part).is_dir() for path in (folder / part).iterdir()]
    check_variant(there, variant, name, set(index) - set(kwargs) - {ADAPTER_SUBFOLDER})
    return folder


def _is_gligen_inpainting(folder: Path, index: dict[str, Any]) -> bool:
    """Whether its U-Net is gated, has nine channels, and is no ordinary inpainting model's."""
    config = read_json(folder / "unet" / "config.json") if (folder / "unet" / "config.json").is_file() else {}
    gated = config.get("attention_type") == "gated" and config.get("in_channels") == 9
    return gated and "Inpaint" not in str(index.get("_class_name"))


def _is_damaged(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return False
    except SafetensorError:
        return True
