"""How well boxes are followed: objects are detected in generated images and compared with what was requested."""

from ..detect.detection import Detection, Detector, Query
from ..detect.detectors import find_detector
from ..detect.matching import ImageScore, ObjectScore, score_image
from ..detect.metrics import point_metrics
from .compare import compare
from .metrics import Estimate, paired_difference, summarize
from .protocol import Protocol
from .protocols import find_protocol
from .report import Report
from .report_files import write_report
from .run import Condition, evaluate_layouts, score_all

__all__ = [
    "Condition",
    "Detection",
    "Detector",
    "Estimate",
    "ImageScore",
    "ObjectScore",
    "Protocol",
    "Query",
    "Report",
    "compare",
    "evaluate_layouts",
    "find_detector",
    "find_protocol",
    "paired_difference",
    "point_metrics",
    "score_all",
    "score_image",
    "summarize",
    "write_report",
]
