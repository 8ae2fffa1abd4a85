"""How well boxes are followed: objects are detected in generated pictures and compared with what was requested."""

from .boxes import ObjectScore, match, summarize
from .detectors import Detector, ShapesDetector, find_detector
from .report import Report, write_report
from .run import evaluate_layouts, held_out_layouts

__all__ = [
    "Detector",
    "ObjectScore",
    "Report",
    "ShapesDetector",
    "evaluate_layouts",
    "find_detector",
    "held_out_layouts",
    "match",
    "summarize",
    "write_report",
]
