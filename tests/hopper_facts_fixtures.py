"""The scripts of bench/hopper_facts as modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench" / "hopper_facts"))

import accumulation
import arithmetic
import driver
import facts
import formats
import rates
import registers

__all__ = ["accumulation", "arithmetic", "driver", "facts", "formats", "rates", "registers"]
