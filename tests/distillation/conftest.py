from __future__ import annotations

from types import ModuleType

import pytest

from tests import lowbit_sr, lrqat


@pytest.fixture(params=[lrqat, lowbit_sr], ids=["lrqat", "lowbit_sr"])
def method(request: pytest.FixtureRequest) -> ModuleType:
    """`tests/lrqat.py` or `tests/lowbit_sr.py`."""
    return request.param
