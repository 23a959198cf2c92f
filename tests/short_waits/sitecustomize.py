"""Makes every wait of a Python process short: Python imports this at its start."""

import time
from typing import SupportsIndex

_sleep = time.sleep


def sleep_shortly(seconds: float | SupportsIndex, /) -> None:
    _sleep(min(float(seconds), 0.001))


time.sleep = sleep_shortly
