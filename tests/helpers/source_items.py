"""All that a source gives, with what its units promise checked on the way."""

import io
import json
import pickle

from PIL import Image

from gligen_xl.prepare.item import Item, Skipped
from gligen_xl.prepare.sources import open_source

HEIGHT, WIDTH = 40, 80


def image(kind="JPEG", size=(WIDTH, HEIGHT), colour=(90, 120, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def put(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def items(path, **options):
    found = []
    for unit in open_source(path, **options):
        copy = pickle.loads(pickle.dumps(unit))
        assert copy.identity() == json.loads(json.dumps(unit.identity()))
        given = list(unit.items())
        assert given == list(copy.items())
        done = [item.done for item in given]
        assert done == sorted(done)
        assert not done or done[-1] <= unit.weight
        found += given
    return found


def reasons(found):
    return {item.image_id: item.reason for item in found if isinstance(item, Skipped)}


def images(found):
    return {item.image_id: item for item in found if isinstance(item, Item)}


def in_pixels(item):
    """Boxes of an item, xyxy, in pixels of an image of this size."""
    return [[round(v * s, 3) for v, s in zip(box, (WIDTH, HEIGHT) * 2, strict=True)] for box in item.boxes]


def dataset(folder, boxes, classes=("cat", "dog"), **more):
    """A data set of supervision whose images lie in `folder`: names -> [(class, box xyxy in pixels), ...]."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it speaks of OpenCV
        import numpy as np
        import supervision as sv

    annotations = {}
    for name, objects in boxes.items():
        path = str(put(folder / name, image()))
        if objects:
            annotations[path] = sv.Detections(
                xyxy=np.array([box for _, box in objects], float),
                class_id=np.array([which for which, _ in objects]),
                **more.get(name, {}),
            )
        else:
            annotations[path] = sv.Detections.empty()
    return sv.DetectionDataset(classes=list(classes), images=list(annotations), annotations=annotations)
