"""Pipelines and their adapters in folders and on the Hub: the part of the mixin that is not about one call."""

from __future__ import annotations

import tempfile
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..adapter import AdapterConfig, GligenAdapter, adopt_gated, detached, is_gated
from ..adapter.convert import holds_adapter, read_published
from ..adapter.io import CONFIG_NAME, weights_name
from ..adapter.pickles import settings_ignored
from ..adapter.weights import missing_tensors
from ..hub import INDEX_NAME, upload
from ..io import read_json, write_json
from ..redact import clean_model_folder
from .encoders import ENCODERS, check_phrase_width
from .folder import (
    ADAPTER_SUBFOLDER,
    check_parts,
    check_tokenizers,
    is_gligen_inpainting,
    naming_errors,
    pipeline_folder,
    read_index,
)
from .weights import check_loaded, check_shards, check_values, without_values

SLOTS_SETTING = "gligen_slots"  # in the index of an exported pipeline, because a gated U-Net's file cannot say it
_keep_types: ContextVar[bool] = ContextVar("keep_types", default=False)  # while from_pipe makes a pipeline


class AdapterLoaderMixin(DiffusionPipeline):
    """A diffusers pipeline whose U-Net may carry a GLIGEN adapter."""

    def register_modules(self, **modules: Any) -> None:
        """diffusers' own; an adapter that diffusers built into the U-Net is converted to ours."""
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
        """Attach the adapter of a folder or Hub repository, in place of the present one, which stays on any error.

        Its scale is 1, whatever that of the former one was.

        Args:
            subfolder: where in the folder or repository it is.
            weight_name: of the weights' file, if it is not `gligen_adapter.safetensors`.
            variant: such as fp16, for `gligen_adapter.fp16.safetensors`.
            hub: revision, cache_dir, token, local_files_only, force_download.

        Raises:
            FileNotFoundError: there is none. ValueError: it is damaged, or for another base: which tensor does not fit.
        """
        if (former := GligenAdapter.find(self.unet)) is not None:
            former.detach()
        try:
            adapter = GligenAdapter.load(
                self.unet, source, subfolder=subfolder, weight_name=weight_name, variant=variant, **hub
            )
            try:
                check_phrase_width(self, adapter.config, source)
            except BaseException:
                adapter.detach()
                raise
        except BaseException:
            if former is not None:
                former.reattach()
            raise
        return adapter.config

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
            dtype: to save in, torch.float32, torch.bfloat16 or torch.float16; by default that of the weights.
            variant: part of the weights' file name, such as fp16.
            push_to_hub: upload the folder, to `repo_id` or a repository of the folder's name.
            hub: repo_id, private, token, commit_message, create_pr, revision.
        """
        if hub and not push_to_hub:
            raise TypeError(f"{sorted(hub)} are for push_to_hub=True")
        GligenAdapter.of(self.unet).save(folder, dtype=dtype, variant=variant)
        if push_to_hub:
            files = [CONFIG_NAME, weights_name(variant)]  # the folder may hold other files
            name = hub.pop("repo_id", Path(folder).resolve().name)
            upload(folder, name, "Upload a GLIGEN adapter", allow_patterns=files, **hub)

    def unload_gligen_adapter(self) -> None:
        """Take the adapter off; the pipeline is the plain one again."""
        GligenAdapter.of(self.unet).detach()

    def set_gligen_adapter_scale(self, scale: float) -> None:
        """Multiply the adapter's gates: 1 as trained, 0 off."""
        GligenAdapter.of(self.unet).set_scale(scale)

    # Loading ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any):  # type: ignore[override]
        """Load a pipeline folder or Hub repository, with its adapter if it has one.

        It may be an ordinary pipeline, one with an adapter in the subfolder `gligen_adapter`, one whose U-Net was
        saved with `attention_type="gated"` (such as `jiuntian/gligen-xl-1024`), or "shapes", the embedded model.
        Code in a repository is never run.

        Args:
            kwargs: those of diffusers' `from_pretrained`; `dtype` (or `torch_dtype`) is float32 by default.
        """
        if kwargs.pop("trust_remote_code", False):
            warnings.warn("trust_remote_code is ignored: code of a repository is never run", stacklevel=2)
        # One type for all parts: by default, transformers keeps the files' type and diffusers does not.
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or torch.float32)
        folder = pipeline_folder(pretrained_model_name_or_path, kwargs)
        index = read_index(folder)
        check_parts(folder, index, kwargs)
        if "Inpaint" in cls.__name__ and "unet" not in kwargs and is_gligen_inpainting(folder, index):
            raise ValueError(
                f"the nine channels of {folder}'s U-Net are GLIGEN's own, not those of {cls.__name__}; load it with "
                "StableDiffusionGLIGENPipeline and give gligen_inpaint_image"
            )
        variant = kwargs.get("variant")
        parts = [name for name in index if name not in kwargs and (folder / name).is_dir()]
        check_shards(folder, parts, variant)
        with naming_errors(folder, index, parts, variant):
            pipeline = super().from_pretrained(str(folder), **kwargs)
        check_loaded(pipeline, folder, parts, variant)
        tokenizers = {name: getattr(pipeline, name, None) for name in ENCODERS.values() if name not in kwargs}
        check_tokenizers(folder, tokenizers)
        if pipeline.unet is None:
            return pipeline
        adapter, subfolder = GligenAdapter.find(pipeline.unet), folder / ADAPTER_SUBFOLDER
        if adapter is None and (subfolder / CONFIG_NAME).is_file():
            has_variant = variant and (subfolder / weights_name(variant)).is_file()
            pipeline.load_gligen_adapter(subfolder, variant=variant if has_variant else None)
        elif adapter is not None and "unet" not in kwargs and SLOTS_SETTING in index:
            adapter.set_slots(index[SLOTS_SETTING])
        return pipeline

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: str | Path, **kwargs: Any):
        """diffusers' own: load a checkpoint in one file, with its adapter if it holds one, as GLIGEN's own do.

        Raises:
            ValueError: it lacks a tensor; or its adapter is incomplete.
        """
        file = Path(pretrained_model_link_or_path)
        if not file.is_file():
            return super().from_single_file(str(pretrained_model_link_or_path), **kwargs)  # type: ignore[misc]
        try:
            with settings_ignored(file):
                pipeline = super().from_single_file(str(file), **kwargs)  # type: ignore[misc]
        except NotImplementedError as error:
            if missing := without_values(error):
                raise missing_tensors(file, missing) from error
            raise
        check_values(pipeline, file)
        if "unet" not in kwargs and GligenAdapter.find(pipeline.unet) is None and holds_adapter(file):
            config, state, about = read_published(file)
            GligenAdapter.attach(pipeline.unet, config, about=about, state=state, source=str(file))
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):  # type: ignore[override]
        """diffusers' own: make a pipeline of this class from the parts of another, adapter included.

        The parts keep their types, which may differ; diffusers casts all of them to one, unless `dtype` says so here.
        """
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or torch_dtype
        slots = pipeline.config.get(SLOTS_SETTING) if is_gated(getattr(pipeline, "unet", None)) else None
        token = _keep_types.set(dtype is None)
        try:
            result = super().from_pipe(pipeline, dtype=dtype, **kwargs)
        finally:
            _keep_types.reset(token)
        if slots is not None:  # a folder of `gligen-xl export` that was loaded by its own file
            GligenAdapter.of(result.unet).set_slots(slots)
        return result

    def to(self, *args: Any, **kwargs: Any):
        return self if _keep_types.get() else super().to(*args, **kwargs)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' own; a class named together with a file of the repository is read as the class alone."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        config.pop(SLOTS_SETTING, None)
        return loaded

    # Saving -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the plain pipeline, which diffusers loads too, and the adapter in its subfolder.

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
        subfolder = Path(save_directory) / ADAPTER_SUBFOLDER
        if (adapter := GligenAdapter.find(self.unet)) is not None:
            adapter.save(subfolder, variant=kwargs.get("variant"))
        elif (subfolder / CONFIG_NAME).is_file():  # of another pipeline; without its description it is not loaded
            (subfolder / CONFIG_NAME).replace(subfolder / f"{CONFIG_NAME}.former")
            warnings.warn(f"the adapter in {subfolder} is not this pipeline's; it stays, as .former", stacklevel=2)
        if push:
            upload(save_directory, hub.pop("repo_id", Path(save_directory).name), "Upload a pipeline", **hub)

    def push_to_hub(self, repo_id: str, *, safe_serialization: bool = True, variant: str | None = None, **hub: Any):  # type: ignore[override]
        """Upload the plain pipeline and the adapter, as `save_pretrained` writes them.

        Args:
            hub: private, token, commit_message, create_pr, revision.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return upload(folder, repo_id, "Upload a pipeline", **hub)
