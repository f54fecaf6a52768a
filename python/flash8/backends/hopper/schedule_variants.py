"""The one variant of hopper/decode/schedule.cu, which makes scheduler metadata.

Tiles, masks and lengths are parameters.
"""

from dataclasses import dataclass

from flash8.compiler import Unit, kernel_root


@dataclass(frozen=True)
class ScheduleVariant:
    """One compilation of hopper/decode/schedule.cu."""

    @property
    def name(self) -> str:
        return "decode_schedule"

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The -D options: none."""
        return ()

    def unit(self) -> Unit:
        """What the compiler is asked for."""
        return Unit(kernel_root() / "decode" / "schedule.cu", self.defines, self.name)


SCHEDULE = ScheduleVariant()
