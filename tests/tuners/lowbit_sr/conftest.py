"""The tests of this folder are about one method."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests import lowbit_sr


@pytest.fixture(scope="module")
def method() -> ModuleType:
    return lowbit_sr
