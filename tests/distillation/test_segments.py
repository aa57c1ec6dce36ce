import pytest
import torch

from peft_lrqat.distillation.segments import segments, without_padding

A, B = [5, 6, 7, 8], [9, 10, 11]


def keys(ids, shift_labels, **inputs):
    ids, shift_labels = torch.tensor(ids), torch.tensor(shift_labels)
    inputs = {"input_ids": ids, **{name: torch.tensor(value) for name, value in inputs.items()}}
    found = list(segments(inputs, without_padding(inputs, shift_labels)))
    return {segment.key: segment.rows.tolist() for segment in found}


def labels(ids):
    return [*ids[1:], -100]


def test_a_sequence_is_found_again_wherever_it_is():
    alone = keys([A], [labels(A)])
    assert list(alone.values()) == [[0, 1, 2]]
    key = next(iter(alone))
    other = keys([B], [labels(B)])
    right = keys([A, [*B, 0]], [labels(A), [*labels(B), -100]], attention_mask=[[1] * 4, [1, 1, 1, 0]])
    left = keys([[0, *B], A], [[9, *labels(B)], labels(A)], attention_mask=[[0, 1, 1, 1], [1] * 4])
    packed = keys([B + A], [labels(B) + labels(A)], position_ids=[[0, 1, 2, 0, 1, 2, 3]])
    counted = keys([A], [labels(A)], position_ids=[[0, 1, 2, 3]])
    assert set(right) == set(left) == set(packed) == {key, *other}
    assert set(counted) == {key}
    assert right[key] == [0, 1, 2]
    assert left[key] == [4, 5, 6]
    assert left[next(iter(other))] == [1, 2]  # not 0, where padding predicts the first token
    assert packed[key] == [3, 4, 5]


def test_other_tokens_or_other_labels_are_another_sequence():
    whole = keys([A], [labels(A)])
    assert not whole.keys() & keys([[5, 6, 7, 9]], [labels(A)]).keys()
    assert not whole.keys() & keys([A], [[-100, *labels(A)[1:]]]).keys()
    assert not whole.keys() & keys([A + A], [labels(A) + labels(A)]).keys()
    assert keys([A], [[-100] * 4]) == {}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": [1.0]}, "called with pixel_values"),
        ({"attention_mask": [[[[0.0]]]]}, "`attention_mask` is"),
        ({"position_ids": [[[0, 1, 2, 3]]]}, "`position_ids` is"),
        ({"cu_seq_lens_q": [0, 4]}, "no `position_ids`"),
    ],
)
def test_what_cannot_be_read_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        keys([A], [labels(A)], **inputs)


def test_a_mask_lets_attention_cross_where_positions_begin_anew():
    """So the row is one sequence then, and other positions, or none that begin anew, are another."""
    ids, wanted, mask = [B + A], [labels(B) + labels(A)], [[1] * 7]
    anew = keys(ids, wanted, attention_mask=mask, position_ids=[[0, 1, 2, 0, 1, 2, 3]])
    on = keys(ids, wanted, attention_mask=mask, position_ids=[[0, 1, 2, 3, 4, 5, 6]])
    assert list(anew.values()) == list(on.values()) == [[0, 1, 3, 4, 5]]
    assert anew.keys() != on.keys()
