"""Which values the settings of a run may have, in words and as tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Expected(NamedTuple):
    """Describes the values that a setting may have, in words and as a test that NaN does not pass."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Expected("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Expected("0 or a positive number", lambda value: 0 <= value < math.inf)
FINITE = Expected("a finite number", math.isfinite)
SHARE = Expected("a share between 0 and 1", lambda value: 0 <= value <= 1)
SHARE_OF_RUN = Expected("a share of the run, above 0 and up to 1", lambda value: 0 < value <= 1)
DECAY = Expected("0 or more, and less than 1", lambda value: 0 <= value < 1)
COUNT = Expected("0 or more", lambda value: value >= 0)
AT_LEAST_1 = Expected("at least 1", lambda value: value >= 1)


def up_to(limit: int, *, least: int = 1) -> Expected:
    return Expected(f"{least} to {limit}", lambda value: least <= value <= limit)


def check_values(options: Any, group: str = "", **expected: Expected) -> None:
    """Refuse a value that is not as expected; None is allowed if it is the default."""
    for name, (words, holds) in expected.items():
        value = getattr(options, name)
        if value is None and options.__dataclass_fields__[name].default is None:
            continue
        if value is None or not holds(value):
            raise ValueError(f"{group}{name} is {value}; expected {words}")
