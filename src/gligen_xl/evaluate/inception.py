"""clean-fid's features of images and its FID; a program of its own, for an interpreter that has clean-fid.

    python inception.py REQUEST.json OUTPUT_FOLDER

It imports nothing of this library, which may not be installed where it runs. REQUEST.json: {"sets": {name: [files]},
"real": name, "device": ..., "workers": ..., "batch_size": ...}. Written: features (n, 2048) a set, as 0.npy, 1.npy, ...
in the order of the sets, and fid.json, {name: FID against the real set}; or error.json, {"kind": ..., "text": ...}.
"""

import json
import sys
from pathlib import Path


def main(request_file: str, output: str) -> None:
    try:
        run(json.loads(Path(request_file).read_text(encoding="utf-8")), Path(output))
    except Exception as error:
        told = {"kind": type(error).__name__, "text": " ".join(str(error).split())}
        (Path(output) / "error.json").write_text(json.dumps(told), encoding="utf-8")
        sys.exit(1)


def run(request: dict, output: Path) -> None:
    from cleanfid import fid  # pyright: ignore[reportMissingImports]  # isort: skip  (first, as it may fail)
    import numpy as np
    import torch

    device = torch.device(request["device"])
    network = fid.build_feature_extractor("clean", device, use_dataparallel=False)
    features = {}
    for number, (name, files) in enumerate(request["sets"].items()):
        features[name] = fid.get_files_features(
            files,
            network,
            num_workers=request["workers"],
            batch_size=request["batch_size"],
            device=device,
            mode="clean",
            description=name,
        )
        np.save(output / f"{number}.npy", features[name])
    real = features.pop(request["real"])
    distances = {name: float(fid.fid_from_feats(of_set, real)) for name, of_set in features.items()}
    (output / "fid.json").write_text(json.dumps(distances), encoding="utf-8")


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: its modules are no packages to import
    main(*sys.argv[1:])
