"""A file is there as a whole, or not at all."""

from __future__ import annotations

import pytest

from peft_lrqat.files import write_atomically


def test_a_failure_keeps_the_old_file_and_leaves_no_other(tmp_path):
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a", "new \udc00")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
