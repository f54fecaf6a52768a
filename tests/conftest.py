"""One thread per test process (CI runs two) and seeds that replay."""

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "flash8",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("flash8")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
