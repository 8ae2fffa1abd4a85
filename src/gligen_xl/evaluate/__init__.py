"""How well boxes are followed: objects are detected in generated pictures and compared with what was requested."""

from .detectors import Detector, ShapesDetector, Wanted, find_detector
from .found import Found
from .metrics import Estimate, paired_difference, point_metrics, summarize
from .paired import compare
from .protocols import Protocol, find_protocol
from .report import Report, write_report
from .run import Condition, evaluate_layouts, score_all
from .scores import ObjectScore, PictureScore, score_picture
from .shapes_layouts import held_out_layouts

__all__ = [
    "Condition",
    "Detector",
    "Estimate",
    "Found",
    "ObjectScore",
    "PictureScore",
    "Protocol",
    "Report",
    "ShapesDetector",
    "Wanted",
    "compare",
    "evaluate_layouts",
    "find_detector",
    "find_protocol",
    "held_out_layouts",
    "paired_difference",
    "point_metrics",
    "score_all",
    "score_picture",
    "summarize",
    "write_report",
]
