"""What the whole-run tests share."""
import os
from pathlib import Path

# Results are equal bit for bit only with an equal number of threads, so it is fixed here and children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

import pytest


@pytest.fixture
def data_root():
    "The folder of data sets too large for the repository; tests that need one are skipped without it"
    given = os.environ.get("DDREPRO_DATA")
    if not given: pytest.skip("DDREPRO_DATA is not set: no folder of data sets on this machine")
    root = Path(given)
    if not root.is_dir(): pytest.skip(f"DDREPRO_DATA names {given}, which is no folder here")
    return root
