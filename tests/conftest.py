"""What every test starts from: a fixed seed, one thread, and uninitialized memory that cannot pass for a result."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels are interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny models: more threads only get in each other's way
    # What this package itself does wrong must fail; what its dependencies deprecate is theirs to fix.
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:(peft_lrqat|tests)(\..*)?")
    config.addinivalue_line("filterwarnings", r"error::FutureWarning:(peft_lrqat|tests)(\..*)?")


def pytest_collection_finish() -> None:
    # What was imported stays. Going through it takes half a second, and every run of a Trainer asks for that.
    gc.freeze()


# torch.manual_seed writes down the stack for each kind of device that may yet be initialized: a millisecond a test.
# Without such a device there is only the CPU's generator.
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeds torch, and lets torch.empty and its kin return NaN (floats) or the largest integer."""
    _seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nothing_stays():
    """After the test no layer keeps a dense weight, and the limit is the default."""
    from peft_lrqat import limit_kept_weights
    from peft_lrqat.modules import generation

    yield
    limit_kept_weights(None)
    assert not generation._SLOTS
    assert not +generation._held
