"""What is no whole GGUF file is refused."""

from __future__ import annotations

import pytest

from peft_lrqat import export
from peft_lrqat.formats.gguf.reader import GGUFFile
from tests.grids import adapted_for_gguf


def test_a_truncated_file_is_refused(tmp_path):
    export(adapted_for_gguf(), tmp_path / "out", format="gguf", vocabulary=False, progress=False)
    path = next((tmp_path / "out").glob("*.gguf"))
    whole = path.read_bytes()
    for length in (3, 20, 400, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"GGUF file|truncated"):
            GGUFFile(path)
