"""The scripts of bench/hopper_facts as modules."""

import accumulation
import arithmetic
import driver
import facts
import formats
import rates
import registers

__all__ = ["accumulation", "arithmetic", "driver", "facts", "formats", "rates", "registers"]
