"""Formats and options that do not exist are named, with those that do."""

from __future__ import annotations

import pytest

from peft_lrqat import can_export, export, formats
from peft_lrqat.grid import Grid
from tests.grids import on_grid

GRID = Grid(4, 32)


def test_unknown_formats_list_those_that_exist(tmp_path):
    for call in (lambda: export({}, tmp_path / "out", "awq"), lambda: can_export({}, "awq")):
        with pytest.raises(ValueError, match=r"'awq'; the formats are compressed-tensors, gptq, .*bitnet"):
            call()


def test_unknown_options(tmp_path):
    model = on_grid(GRID)
    with pytest.raises(ValueError, match="no option 'group_size'; its options are checkpoint_format"):
        export(model, tmp_path / "out", "gptq", group_size=64)
    with pytest.raises(ValueError, match="no option 'no_such'; it has no options"):
        can_export(model, "compressed-tensors", no_such="x")
    with pytest.raises(ValueError, match=r"no option 'fromat'. Did you mean `format`\?"):
        export(model, tmp_path / "out", fromat="gptq")
    with pytest.raises(ValueError, match=r"no option 'checkpoint_fromat'. Did you mean `checkpoint_format`\?"):
        can_export(model, "gptq", checkpoint_fromat="gptq_v2")
    with pytest.raises(ValueError, match=r"`checkpoint_format` is 'v3'; allowed are 'gptq', 'gptq_v2'"):
        can_export(model, "gptq", checkpoint_format="v3")


def test_an_extra_that_is_missing(monkeypatch):
    monkeypatch.setattr(formats.writer_of("torchao").__class__, "needs", ("no_such_package",))
    with pytest.raises(ImportError, match="needs the package 'no_such_package': `pip install no_such_package`"):
        can_export(on_grid(GRID), "torchao")
