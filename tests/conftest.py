"""What several test files share: one thread per worker, fixed seeds, the data pack."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

# Before torch and numpy load their BLAS: several workers with a thread pool each would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background; commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("devec", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("devec")


def pytest_configure() -> None:
    torch.set_num_threads(1)  # a team of threads on busy cores takes up to ten times as long


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Global generators start alike in every test, so that no test depends on those before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test read the legacy generator
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_pack() -> Path:
    """The folder of real adapters, checkpoints, images and text that DEVEC_DATA names."""
    named = os.environ.get("DEVEC_DATA")
    if not named:
        pytest.skip("needs the data pack: set DEVEC_DATA to its folder")
    root = Path(named)
    missing = [part for part in ("adapters", "checkpoints") if not (root / part).is_dir()]
    if missing:
        pytest.fail(f"DEVEC_DATA = {root} has no {' and no '.join(missing)} folder")
    return root
