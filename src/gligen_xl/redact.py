"""What may be said of where things are: without passwords and keys, and, in what is shared, without folders.

`redacted` is for everything that is written or shown, as logs, errors and config.json. `public` is for what leaves the
machine: adapters, model cards, images, shards, reports.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .io import names_repository, read_json, write_json

HIDDEN = "..."
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,60}://[^\s'\"<>]+")  # bounded: else a long word takes quadratic time
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # of the Hugging Face Hub
_HARMLESS = frozenset({"download", "partnumber", "region", "revision", "version", "versionid"})  # query parameters
_HUB_NAMES = frozenset(
    {"model", "base_model", "init_adapter", "converted_from", "adapter", "vae", "detector", "controlnet", "lora",
     "config", "clip", "segmenter"}
)  # fmt: skip  # settings that may name a repository
_PLACES = _HUB_NAMES | {
    "data", "out", "captions", "source", "image", "mask", "inpaint_image", "control_image", "pictures", "fid",
    "compare", "coco", "real", "file", "folder", "path", "cache", "instances",
}  # fmt: skip
_CONTAINERS = ("abfs", "abfss", "az", "wasb", "wasbs")  # container@account, which is no secret
_WORDS = frozenset({"prompt", "negative_prompt", "phrases", "caption", "text", "id"})  # never a place
_ABSOLUTE = re.compile(r"(?:/[^/\n]+){2,}/?|~[\w.-]*[/\\].*|[A-Za-z]:[\\/].*|\\\\.*")
_SCALE = r"=[-+.\deE]+$"  # that may stand behind the name of a LoRA
_SNAPSHOT = re.compile(r"models--(.+?)--([^/\\]+)[/\\]snapshots[/\\]")  # in the cache of the Hub's library
_PATH_IN_TEXT = re.compile(
    r"(?<![\w/.:~-])(?:~[\w.-]*)?/(?:[^\s/'\",;:()]+/)+|(?<!\w)[A-Za-z]:\\(?:[^\s\\'\",;:()]+\\)+"
)


def redacted(text: str, *, of: str = "") -> str:
    """Text whose addresses say nothing secret: s3://KEY:SECRET@bucket/a?token=X -> s3://...@bucket/a?token=...

    The same secret address always gives the same text, so redacted settings can be compared.

    Args:
        of: an address whose secrets may stand in the text in parts, as storages put it into their errors.
    """
    for secret in _secrets(of):
        text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, _ADDRESS.sub(lambda match: _redacted_address(match[0]), text))


def redacted_values(value: Any) -> Any:
    """Settings in which every text, keys included, is redacted."""
    if isinstance(value, Mapping):
        return _distinct((redacted_values(name), redacted_values(inner)) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return [redacted_values(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def public(value: Any, name: str = "") -> Any:
    """Settings without the machine that they were made on: paths and addresses become their last names.

    Args:
        name: of the setting. Those that name a place lose every folder, others only absolute paths.
    """
    if isinstance(value, Mapping):
        places = name in _PLACES  # as data with weights
        return _distinct(
            (public_name(str(key)) if places or _is_place(str(key)) else str(key), public(inner, str(key)))
            for key, inner in value.items()
        )
    if isinstance(value, list | tuple):
        return [public(inner, name) for inner in value]
    if not isinstance(value, str) or name in _WORDS:
        return value
    if name in _PLACES or _is_place(value):
        return public_name(value, hub=name in _HUB_NAMES)
    return public_text(value)


def public_name(text: str, *, hub: bool = False) -> str:
    """Return what may be said of a path: "/home/me/shards-512" -> "shards-512", "s3://bucket/set?key" -> "set".

    Args:
        hub: it may be a repository's name, which stays; as do addresses of the Hub.
    """
    if snapshot := _SNAPSHOT.search(text):
        return f"{snapshot[1]}/{snapshot[2]}"
    file = re.sub(_SCALE, "", text)
    text = redacted(text)
    exists = os.path.exists(file)  # noqa: PTH110 - it raises nothing, whatever the text holds
    if text.startswith("hf://") or (hub and names_repository(re.sub(_SCALE, "", text)) and not exists):
        return text
    if "://" in text:
        text = text.rpartition("://")[2].split("?")[0].split("#")[0].removeprefix(f"{HIDDEN}@")
    name = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return Path(text).resolve().name if name in (".", "..", "~") else name


def public_text(text: str) -> str:
    """Return a sentence, such as an error's, in which absolute paths are their last names."""
    return _PATH_IN_TEXT.sub("", redacted(text))


def clean_model_folder(folder: str | Path) -> None:
    """Take the places that a model was loaded from out of the settings in its folder, where diffusers and transformers
    write them."""
    folder = Path(folder)
    for file in (*folder.glob("*.json"), *folder.glob("*/*config.json")):
        settings = read_json(file)
        if not isinstance(settings, dict):
            continue
        cleaned = {
            name: public_name(value, hub=True)
            if isinstance(value, str) and (name.endswith("name_or_path") or _is_place(value))
            else value
            for name, value in settings.items()
        }
        if cleaned != settings:
            write_json(file, cleaned)


def _is_place(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://\S+", text) or _ABSOLUTE.fullmatch(text))


def _distinct(items: Any) -> dict[Any, Any]:
    """Return a dictionary in which two names that became the same are told apart by a number."""
    values: dict[Any, Any] = {}
    for name, value in items:
        number, free = 2, name
        while free in values:
            free, number = f"{name} ({number})", number + 1
        values[free] = value
    return values


def _redacted_address(address: str) -> str:
    kind, _, rest = address.partition("://")
    if rest.count("://") > 8:  # no address that anybody uses
        return f"{kind}://{HIDDEN}"
    if "://" in rest:  # a chain of fsspec, as simplecache::s3://
        return f"{kind}://{_redacted_address(rest)}"
    place, mark, query = rest.partition("?")
    place, anchor, secret = place.partition("#") if kind.lower() in ("http", "https") else (place, "", "")
    host, slash, path = place.partition("/")
    if "@" in host and not (kind.lower() in _CONTAINERS and ":" not in host):
        place = f"{HIDDEN}@{host.rpartition('@')[2]}{slash}{path}"
    elif "@" in path and ":" in host and not re.fullmatch(r"[^:]*:\d{1,5}|\[[^\]]*\](:\d{1,5})?", host):
        place = f"{HIDDEN}@{path.rpartition('@')[2]}"  # a secret with a slash in it
    if not mark:
        return f"{kind}://{place}{anchor}{HIDDEN if '=' in secret else secret}"
    query, fragment_mark, fragment = query.partition("#")
    parts = [_redacted_parameter(part, kind) for part in re.split("&(?:amp;)?", query)]
    fragment = HIDDEN if "=" in fragment else fragment
    return f"{kind}://{place}?{'&'.join(parts)}{fragment_mark}{fragment}"


def _secrets(address: str) -> list[str]:
    """Return the parts of an address that `redacted` leaves out, the longest first."""
    shown, parts = redacted(address) if address else "", []
    if f"//{HIDDEN}@" in shown:
        end = shown.partition(f"//{HIDDEN}@")[2]
        user = address.rpartition("://")[2]
        user = user[: user.rfind("@" + end.split("?")[0].split("#")[0])] if end else user.rpartition("@")[0]
        parts += [user, *user.split(":", 1)]
    hidden = {part.partition("=")[0] for part in re.split("[?&#]", shown) if part.endswith(f"={HIDDEN}")}
    for part in re.split("[?&#]", address)[1:]:
        name, _, value = part.partition("=")
        parts += [value] if name in hidden else []
    return sorted({part for part in parts if len(part) > 2}, key=len, reverse=True)


def _redacted_parameter(part: str, kind: str) -> str:
    name, equals, value = part.partition("=")
    if not equals:  # "?" is a wildcard of other kinds of storage
        return HIDDEN if kind.lower() in ("http", "https") and part else part
    return part if name.lower() in _HARMLESS else f"{name}={HIDDEN}" if value else part
