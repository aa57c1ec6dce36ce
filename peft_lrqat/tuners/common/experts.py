"""Which experts of mixtures a configuration means, and how they become layers that can be adapted.

transformers 5 holds the experts of a layer in parameters of three dimensions, which PEFT's `target_modules` does not
know. Before PEFT looks for targets, `modules.experts.Experts` takes the place of such a module, with a layer for each
projection, called as the parameter was: `...experts.gate_up_proj` is a name as any other then. Experts go onto the grid
whole or not at all, because one function multiplies with all projections.

'all-linear' means them, as it does for PEFT's LoRA; so do `target_parameters`, a list that names all their projections,
by the names of the parameters or by those in files (`gate_proj`, `up_proj`, `down_proj`), and a regular expression.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.integrations import skip_init_on_device
from torch import nn

from ...modules.architecture import expert_parts
from ...modules.experts import Experts, ExpertStack, Parts, is_stacked, projections
from ...modules.packed import MERGED, QuantizedStack
from ...modules.split_experts import joined_experts, split_experts
from .config import ALL_LINEAR


class Adopted(NamedTuple):
    """Experts that became layers, of which nothing is adapted yet."""

    before: nn.Module
    after: Experts


@skip_init_on_device  # PEFT's low_cpu_mem_usage puts new parameters on the meta device; these are the model's own
def adopt_experts(model: nn.Module, config: Any) -> dict[str, Adopted]:
    """Make layers of experts that `config` may mean, and name them in its `target_modules`.

    Returns:
        Name of a module -> what it was, and is now.

    Raises:
        ValueError: `config` asks for experts that cannot be quantized, or for other parameters.
    """
    wanted = _Wanted(config)
    adopted: dict[str, Adopted] = {}
    refused: dict[str, list[str]] = {}
    for name, module in _candidates(model):
        parts = module.parts if isinstance(module, Experts) else expert_parts(model, name)
        if wanted.excludes(name, parts or dict.fromkeys(projections(module), ())):
            continue
        if problem := _problem(model, name, module, parts, config):
            if wanted.names(name, projections(module)):
                raise ValueError(f"The experts of {name!r} ({type(module).__name__}) cannot be quantized: {problem}.")
            refused[problem] = [*refused.get(problem, ()), name]
            continue
        assert parts is not None
        wanted.add(name, parts)
        after = joined_experts(module) if isinstance(module, Experts) else Experts(module, parts)
        adopted[name] = Adopted(module, after)
    wanted.finish()
    for name, (_, after) in adopted.items():
        _put(model, name, after)
    if config.target_modules == ALL_LINEAR:
        for problem, names in refused.items():
            said = f"The experts of {len(names)} layers, e.g. {names[0]!r}, stay as they are: {problem}."
            warnings.warn(said, stacklevel=2)
    return adopted


def release_experts(model: nn.Module, adopted: dict[str, Adopted], targets: dict[str, nn.Module]) -> bool:
    """Put back experts that `targets`, what PEFT will adapt, does not have. Returns whether others are left."""
    left = False
    for name, (before, after) in adopted.items():
        layers = [f"{name}.{projection}" for projection in after.parts]
        found = [layer for layer in layers if layer in targets]
        if len(found) == len(layers):
            left = True
            continue
        _put(model, name, before)
        if found:
            others = ", ".join(sorted({part for parts in after.parts.values() for part in parts}))
            warnings.warn(
                f"`target_modules` names a part of the experts of {name!r} only, so they stay float. Name all of it "
                f"({others}), or use 'all-linear'.",
                stacklevel=2,
            )
    return left


def settle_experts(model: nn.Module) -> None:
    """Give experts the form in which models hold them, when adapters are gone: floats transformers' own, integers one
    layer an expert."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts) and module.stacks:
            kinds = {type(stack) for stack in module.stacks.values()}
            if kinds == {ExpertStack}:
                _put(model, name, module.original())
            elif kinds == {QuantizedStack}:
                split_experts(module)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Experts that are not adapted: as transformers holds them, or as merging leaves them."""
    quantized = any(isinstance(m, MERGED) or hasattr(m, "quantization_scheme") for m in model.modules())
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        if not name or name.startswith(inside):
            continue
        if isinstance(module, Experts):
            if not module.stacks:
                yield name, module
        elif is_stacked(module) and not quantized:  # what a quantized model has left float stays so
            yield name, module


def _problem(model: nn.Module, name: str, module: nn.Module, parts: Any, config: Any) -> str:
    """Why experts cannot be quantized; "" if they can."""
    if problem := config.experts_problem():
        return problem
    if parts is None or getattr(module, "is_transposed", False) or getattr(module, "has_bias", False):
        return (
            f"files of {type(model).__name__} hold them as {', '.join(projections(module)) or 'one tensor'}, for which "
            "no format of engines has integers"
        )
    if any(config.activations_of(f"{name}.{projection}") is not None for projection in parts):
        return "their inputs would be rounded (`act_bits`), which is not done for experts; see `act_bits_pattern`"
    return ""


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class _Wanted:
    """What a configuration says about experts, and what becomes of its `target_modules`."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.parameters: set[str] = set(getattr(config, "target_parameters", None) or ())
        self.met: set[str] = set()  # of `parameters`
        self.more: set[str] = set()  # names of layers

    def excludes(self, name: str, parts: Parts) -> bool:
        """Whether experts, or a part of them, are left out by name."""
        exclude = self.config.exclude_modules
        inner = [*parts, *(part for names in parts.values() for part in names)]
        return bool(exclude) and any(_matches(exclude, key) for key in (name, *(f"{name}.{part}" for part in inner)))

    def names(self, name: str, found: list[str]) -> bool:
        """Whether experts are asked for by name."""
        keys = [f"{name}.{projection}" for projection in found]
        if any(_matches(self.parameters, key) for key in keys):
            return True
        targets = self.config.target_modules
        if targets == ALL_LINEAR or not targets:
            return False
        entries = [targets] if isinstance(targets, str) else list(targets)
        return any(
            ("expert" in entry or (entry in found and len(entry.split("_")) > 2))
            and _matches(entry if isinstance(targets, str) else {entry}, key)
            for entry in entries
            for key in keys
        )

    def add(self, name: str, parts: Parts) -> None:
        """Take note of the layers of one module that are meant, but not by their own names."""
        targets = self.config.target_modules
        for projection, names in parts.items():
            key = f"{name}.{projection}"
            for entry in self.parameters:
                if _matches({entry}, key):
                    self.met.add(entry)
                    self.more.add(key)
            by_file = (check_target_module_exists(self.config, f"{name}.{part}") for part in names)
            if isinstance(targets, set) and all(found is True for found in by_file):
                self.more.add(key)

    def finish(self) -> None:
        """Write it into the configuration.

        Raises:
            ValueError: `target_parameters` names something else than experts.
        """
        config = self.config
        if unknown := sorted(self.parameters - self.met):
            raise ValueError(
                f"`target_parameters` names {unknown[0]!r}, which is no projection of experts in this model (such as "
                "'experts.gate_up_proj'). Linear layers are named in `target_modules`."
            )
        if self.parameters:
            config.target_parameters = None  # PEFT would wrap them
        if not self.more or config.target_modules == ALL_LINEAR:
            return
        if isinstance(config.target_modules, str):
            config.target_modules = "|".join([f"(?:{config.target_modules})", *map(re.escape, sorted(self.more))])
        else:
            config.target_modules = {*(config.target_modules or ()), *self.more}


def _matches(entries: Any, key: str) -> bool:
    """Whether a name is among `target_modules`, `exclude_modules` or the like, as PEFT looks for it."""
    if isinstance(entries, str):
        return re.fullmatch(entries, key) is not None
    return any(key == entry or key.endswith(f".{entry}") for entry in entries)
