"""Objects in images: detections, what a detector is asked for, and the detectors themselves."""
