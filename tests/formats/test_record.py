"""What config.json says of the training comes back as it was."""

from __future__ import annotations

import json

import pytest

from peft_lrqat.formats.record import Record
from peft_lrqat.grid import Grid


@pytest.mark.parametrize("others", [{}, {"a": Grid(8, -1), "b": Grid(8, -1), "c": Grid(2, 32, False)}])
def test_a_record_survives_json(others: dict):
    record = Record(Grid(1.58, 0), "auto", "a recipe", others)
    again = Record.read(json.loads(json.dumps(record.entry())))
    assert again == record
    assert again.grid_of("a") == others.get("a", Grid(1.58, 0))
    assert again.grid_of("elsewhere") == Grid(1.58, 0)


def test_only_layers_on_another_grid_are_listed():
    record = Record(Grid(3, 32)).with_layers({"x": Grid(3, 32), "y": Grid(4, 32)})
    assert record.others == {"y": Grid(4, 32)}
    assert "others" not in Record(Grid(3, 32)).with_layers({"x": Grid(3, 32)}).entry()


def test_what_8_bit_codes_are_fixed_point_numbers_of():
    record = Record(Grid(8, 32), "auto", "a recipe", {}, 3)
    assert Record.read(json.loads(json.dumps(record.entry()))) == record
    assert "fixed_point_bits" not in Record(Grid(8, 32)).entry()
    with pytest.raises(ValueError, match=r"`fixed_point_bits` 8; allowed are 2 to 7"):
        Record.read({**record.entry(), "fixed_point_bits": 8})


def test_what_was_trained_and_from_what():
    record = Record(Grid(4, 32), base="someone/tiny", trainings=({"training": "2 steps"}, {"training": "3 steps"}))
    assert Record.read(json.loads(json.dumps(record.entry()))) == record
    assert not {"base", "trainings"} & Record(Grid(4, 32)).entry().keys()
    with pytest.raises(ValueError, match=r"`trainings` 'x', which must be a list of dictionaries"):
        Record.read({**record.entry(), "trainings": "x"})


@pytest.mark.parametrize("entry", [{"bits": 4}, {"bits": 4, "group_size": 32, "symmetric": True, "others": [{}]}, "x"])
def test_an_entry_that_describes_no_grid(entry):
    with pytest.raises(ValueError, match=r"describes no grid\. Delete the entry"):
        Record.read(entry)
    assert Record.read(None) is None
