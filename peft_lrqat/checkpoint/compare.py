"""Whether two sources hold the same integers, scales, zero points and other tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..formats.source import Source
from ..grid import GridTensor
from ..ops.activations import describe_activations
from ..ops.kv_cache import describe_cache
from .findings import Finding


def integers(checkpoint: Source, source: Source, progress: Callable[[str], None] = lambda name: None) -> Finding:
    """Compare the linear layers of a checkpoint with those of what it was made from, a layer at a time.

    Args:
        progress: called with a layer's name when it is done.
    """
    what, grids = "codes, scales, zero points", checkpoint.grids()
    linears = {name for name, info in source.grids().items() if info.kind == "linear"}
    if linears != set(grids):
        return Finding(what, False, f"other layers: {sorted(linears ^ set(grids))[:3]}")
    different = []
    for name in grids:
        if not _equal(checkpoint.layer(name), source.layer(name)):
            different.append(name)
        progress(name)
    weights = sum(info.weights for info in grids.values())
    if different:
        return Finding(what, False, f"{len(different)} of {len(grids)} layers differ: {different[0]}, ...")
    return Finding(what, True, f"{len(grids)} layers, {weights:,} weights: all equal")


def _equal(a: GridTensor, b: GridTensor) -> bool:
    """Whether two weights have the same codes, scales and zero points, where one may repeat what the other shares."""
    if a.codes.shape != b.codes.shape or not torch.equal(a.codes.cpu(), b.codes.cpu()):
        return False
    fixed = [t.input_scale is not None for t in (a, b)]
    if fixed[0] != fixed[1] or (fixed[0] and not torch.equal(a.input_scale.cpu(), b.input_scale.cpu())):  # type: ignore
        return False
    pairs = [(a.scale, b.scale)]
    if a.zero_point is not None or b.zero_point is not None:
        zeros = [torch.zeros_like(t.scale, dtype=torch.int8) if t.zero_point is None else t.zero_point for t in (a, b)]
        pairs.append((zeros[0], zeros[1]))
    for left, right in pairs:
        rows, groups = max(len(left), len(right)), max(left.shape[1], right.shape[1])
        spread = [t.cpu().repeat_interleave(groups // t.shape[1], 1).expand(rows, -1) for t in (left, right)]
        if spread[0].shape != spread[1].shape or not torch.equal(spread[0], spread[1]):
            return False
    return True


def activations(checkpoint: Source, source: Source) -> Finding:
    """Compare how inputs are rounded."""
    found = [which.activations() for which in (checkpoint, source)]
    said = [" and ".join(sorted(map(describe_activations, those))) for those in found]
    equal = found[0] == found[1]
    return Finding("activations", equal, said[0] if equal else f"{said[0]}, and in the source {said[1]}")


def caches(checkpoint: Source, source: Source) -> Finding:
    """Compare how keys and values are rounded."""
    said = [describe_cache(which.cache) for which in (checkpoint, source)]
    equal = checkpoint.cache == source.cache
    return Finding("KV cache", equal, said[0] if equal else f"{said[0]}, and in the source {said[1]}")


def floats(checkpoint: Source, source: Source) -> Finding:
    """Compare every other tensor, bit for bit and in dtype."""
    what, packed = "other tensors", checkpoint.grids()
    expected: dict[str, torch.Tensor] = {}
    wanted = source.floats(packed)
    count = 0
    for name, tensor in checkpoint.floats(packed):
        while name not in expected:  # the two orders differ little, so few tensors wait here
            following = next(wanted, None)
            if following is None:
                return Finding(what, False, f"{name} is not in the source")
            expected[following[0]] = following[1]
        other = expected.pop(name)
        other = other.cpu()
        if other.dtype != tensor.dtype:
            said = f"{name} is {_name(tensor.dtype)}, and {_name(other.dtype)} in the source"
            same = tensor.shape == other.shape and torch.equal(tensor.double(), other.double())
            return Finding(what, False, f"{said}, with {'equal' if same else 'other'} values")
        if not torch.equal(tensor, other):
            return Finding(what, False, f"{name} differs")
        count += 1
    left_over = [*expected, *(name for name, _ in wanted)]
    if left_over:
        return Finding(what, False, f"missing: {', '.join(left_over[:3])}")
    return Finding(what, True, f"{count} tensors: all equal")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
