"""Says whether the files that a unit is made of are still the same, by a look at the disk that opens none of them.

files_identity(folder, ["a.jpg", "b/c.jpg"])  # another string once one of them is mended, replaced, added or gone
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..worlds import find_world
from .settings import Settings


def files_identity(folder: Path, names: Iterable[str]) -> str:
    """Checksum names, sizes and times of change (nanoseconds) of files, in their order; links are followed.

    A file that is missing, or cannot be looked at, counts as such. Measured: 10,000 files in 0.1 s on a local disk.

    Args:
        names: paths below `folder`.
    """
    digest, root = hashlib.sha256(), os.fspath(folder)
    for name in names:
        try:
            stat = os.stat(f"{root}/{name}")  # noqa: PTH116, a Path for each takes twice the time
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError: a name that no file can have
            state = "absent"
        digest.update(f"{name}\0{state}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def weights_of(settings: Settings) -> dict[str, str]:
    """Checksum the contents of the VAE and of the detector ("vae", "detector"), if these are local folders or files.

    A copy has the same checksum; another model under the same name has not. Repositories of the Hub are left out.
    """
    world = find_world(settings.vae)
    vae = world.model_folder() if world else Path(settings.vae)
    vae = vae / "vae" if (vae / "vae" / "config.json").is_file() else vae
    places = {"vae": vae}
    if settings.detector is not None and not find_world(settings.detector):
        places["detector"] = Path(settings.detector).expanduser()
    return {name: _contents_identity(place) for name, place in places.items() if place.exists()}


def _contents_identity(place: Path) -> str:
    endings = (".safetensors", ".bin", ".json", ".txt", ".model")
    inside = sorted(path for path in place.iterdir() if path.suffix in endings) if place.is_dir() else [place]
    digest = hashlib.sha256()
    for path in filter(Path.is_file, inside):
        with path.open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").digest()
        digest.update(os.fsencode(path.relative_to(place)) + b"\0" + contents)
    return digest.hexdigest()[:16]
