"""Settings of every test: no Ray tokens in the home folder, and seeds that do not depend on the order of tests."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "agg")
# Tests run on two processes (see pyproject.toml) and multiply small matrices: threads would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
