# SPDX-License-Identifier: BSD-3-Clause
"""What processes of units do in tests."""

import os
import time
from pathlib import Path


def sleep(module, unit):
    """Never ends by itself."""
    time.sleep(60)


def die_once(module, unit):
    """The first process ends without a word."""
    mark = Path(os.environ["ODD_UNITS"])
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return {"result": {"loss": 1.0}, "where": {}, "seconds": 0.0}
