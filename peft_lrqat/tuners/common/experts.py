"""Which experts of mixtures a configuration means, and how they become layers that can be adapted.

transformers 5 holds the experts of a layer in parameters of three dimensions, which PEFT's `target_modules` does not
know. Before PEFT looks for targets, `modules.experts.Experts` takes the place of such a module, with a layer for each
projection, called as the parameter was: `...experts.gate_up_proj` is a name as any other then. Experts go onto the grid
whole or not at all, because one function multiplies with all projections.

'all-linear' means them, as it does for PEFT's LoRA; so do `target_parameters`, and a list or a regular expression that
names the module (`experts`) or all its projections: by the names of the parameters, or by those in files (`gate_proj`,
`up_proj`, `down_proj`; `experts.0.gate_proj` and so on).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
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
        ValueError: `config` asks for experts that cannot be quantized, for single ones, or for other parameters.
    """
    wanted = _Wanted(config)
    adopted: dict[str, Adopted] = {}
    refused: dict[str, list[str]] = {}
    for name, module in _candidates(model):
        found = _Found.of(model, name, module)
        meant = wanted.meant(found)
        standing = isinstance(module, Experts) and bool(module.stacks)  # layers already, with another adapter
        if wanted.excludes(found, bool(meant) and not standing):
            continue
        if standing:
            wanted.add(found, meant, standing=True)
            continue
        if problem := _problem(model, name, module, found.parts, config):
            if wanted.names(found):
                raise ValueError(f"The experts of {name!r} ({type(module).__name__}) cannot be quantized: {problem}.")
            if meant:
                refused.setdefault(problem, []).append(name)
            continue
        assert found.parts is not None
        wanted.add(found, meant)
        after = joined_experts(module) if isinstance(module, Experts) else Experts(module, found.parts)
        adopted[name] = Adopted(module, after)
    wanted.finish(model)
    for name, (_, after) in adopted.items():
        _put(model, name, after)
    for problem, names in refused.items():
        warnings.warn(f"The experts of {_listed(names)} stay as they are: {problem}.", stacklevel=2)
    return adopted


def release_experts(model: nn.Module, adopted: dict[str, Adopted], targets: dict[str, nn.Module]) -> bool:
    """Put back experts that `targets`, what PEFT will adapt, does not have. Returns whether others are left."""
    left = False
    for name, (before, after) in adopted.items():
        if all(f"{name}.{projection}" in targets for projection in after.parts):
            left = True
        else:
            _put(model, name, before)
    return left


def restore_experts(model: nn.Module, adopted: dict[str, Adopted]) -> None:
    """Put back all experts as they were."""
    for name, (before, _) in adopted.items():
        _put(model, name, before)


def expose_stacks(model: nn.Module, names: Iterable[str]) -> dict[str, ExpertStack]:
    """Make layers of float experts, until `settle_experts`.

    Args:
        names: of projections, all of each module, that `adopt_experts` can take.

    Returns:
        Name -> layer.
    """
    names = list(names)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in names):
        parts = expert_parts(model, name)
        assert parts is not None
        _put(model, name, Experts(model.get_submodule(name), parts))
    return {name: model.get_submodule(name) for name in names}  # type: ignore[misc]  # an ExpertStack each


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
    """Experts: as transformers holds them, as merging leaves them, or with adapters."""
    quantized = any(isinstance(m, MERGED) or hasattr(m, "quantization_scheme") for m in model.modules())
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        if not name or name.startswith(inside):
            continue
        if isinstance(module, Experts) or (is_stacked(module) and not quantized):  # what it has left float stays so
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


class _Found(NamedTuple):
    """Experts of a model, and what they are called."""

    name: str
    experts: int
    parts: Parts | None  # None: files hold them otherwise
    projections: list[str]
    in_files: str  # what files call the module

    @classmethod
    def of(cls, model: nn.Module, name: str, module: Any) -> _Found:
        if isinstance(module, Experts):
            return cls(name, module.num_experts, module.parts, list(module.parts), name)
        files: set[str] = set()
        parts = expert_parts(model, name, files)
        in_files = min(files).rsplit(".", 2)[0] if files else name
        return cls(name, module.num_experts, parts, projections(module), in_files)

    def parts_of(self, projection: str) -> tuple[str, ...]:
        return (self.parts or {}).get(projection, ())

    def of_each(self, part: str) -> Iterator[list[str]]:
        """What a part is called, for each expert: in files, and in merged models."""
        places = dict.fromkeys((self.in_files, self.name))
        return ([f"{place}.{expert}.{part}" for place in places] for expert in range(self.experts))


class _Wanted:
    """What a configuration says about experts, and what becomes of its `target_modules`."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.parameters: set[str] = set(getattr(config, "target_parameters", None) or ())
        self.met: set[str] = set()  # of `parameters`
        self.more: set[str] = set()  # names of layers
        self.by_part: set[str] = set()  # names of `target_modules` that mean parts of these
        self.layers: set[str] = set()  # names of experts that are, or become, layers
        self.in_part: list[_Found] = []  # what is named in part
        self.excluded_in_part: list[_Found] = []

    def excludes(self, found: _Found, meant: bool) -> bool:
        """Whether experts, or a part of them, are left out by name.

        Args:
            meant: whether they would be quantized otherwise, or some of them.
        """
        exclude = self.config.exclude_modules
        if not exclude:
            return False
        whole = _matches(exclude, found.name) or _matches(exclude, found.in_files)
        left = [p for p in found.projections if whole or self._reaches(exclude, found, p, "exclude_modules", any)]
        if left and len(left) < len(found.projections) and meant:
            self.excluded_in_part.append(found)
        return bool(left)

    def meant(self, found: _Found) -> set[str]:
        """The projections that `target_modules` or `target_parameters` means."""
        targets, met = self.config.target_modules, set()
        for projection in found.projections:
            key = f"{found.name}.{projection}"
            mine = {entry for entry in self.parameters if _matches({entry}, key)}
            self.met |= mine
            if (mine and self._in_layers(mine, key)) or targets == ALL_LINEAR:
                met.add(projection)
            elif targets and self._in_layers(targets, key, found.name):
                whole = _matches(targets, found.name)
                if whole or self._reaches(targets, found, projection, "target_modules", all):
                    met.add(projection)
        return met

    def names(self, found: _Found) -> bool:
        """Whether experts are asked for by a name that nothing else has."""
        keys = [f"{found.name}.{projection}" for projection in found.projections]
        if any(_matches(self.parameters, key) for key in keys):
            return True
        targets = self.config.target_modules
        if targets == ALL_LINEAR or not targets:
            return False
        entries = [targets] if isinstance(targets, str) else list(targets)
        return any(
            ("expert" in entry or (entry in found.projections and len(entry.split("_")) > 2))
            and _matches(entry if isinstance(targets, str) else {entry}, key)
            for entry in entries
            for key in (found.name, *keys)
        )

    def _reaches(self, entries: Any, found: _Found, projection: str, option: str, how: Any) -> bool:
        """Whether some names are those of a projection, or of its parts.

        Args:
            how: all or any of the parts.

        Raises:
            ValueError: they are names of some experts.
        """

        def matches(key: str) -> bool:
            if not isinstance(entries, str):
                self.by_part.update(entry for entry in entries if _matches({entry}, key))
            return _matches(entries, key)

        if matches(f"{found.name}.{projection}"):
            return True
        reached = []
        numbered = isinstance(entries, str) or any(re.search(r"\.\d+\.", entry) for entry in entries)
        for part in found.parts_of(projection):
            hit = matches(f"{found.name}.{part}")
            if not hit and numbered:
                each = [any(_matches(entries, one) for one in called) for called in found.of_each(part)]
                if any(each) and not all(each) and isinstance(entries, str) and option == "target_modules":
                    self.in_part.append(found)  # a pattern may be meant for layers of that number
                elif any(each) and not all(each):
                    raise ValueError(
                        f"`{option}` names {sum(each)} of the {found.experts} experts of {found.name!r} ({part}). The "
                        "experts of a layer are quantized together or not at all: name all of them, for instance "
                        f"{found.name.rpartition('.')[2]!r}."
                    )
                hit = all(each)
            reached.append(hit)
        return bool(reached) and how(reached)

    def _in_layers(self, entries: Any, key: str, *more: str) -> bool:
        """Whether a module is in `layers_to_transform`, where names are not whole."""
        if isinstance(entries, str) or any(entry in (key, *more) for entry in entries):
            return True
        plan = copy.copy(self.config)
        plan.exclude_modules, plan.target_modules = None, {key.rpartition(".")[2]}
        return check_target_module_exists(plan, key) is True

    def add(self, found: _Found, meant: set[str], standing: bool = False) -> None:
        """Take note of the layers of one module that are meant, but not by their own names.

        Args:
            standing: they are layers with adapters, and one more adapter may be for some.
        """
        self.layers.add(found.name)
        if not standing and meant and len(meant) < len(found.projections):
            self.in_part.append(found)
        elif self.config.target_modules != ALL_LINEAR:
            self.more |= {f"{found.name}.{projection}" for projection in meant}

    def finish(self, model: nn.Module) -> None:
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
        for option, found in (("target_modules", self.in_part), ("exclude_modules", self.excluded_in_part)):
            if found:
                names = list(dict.fromkeys(one.name for one in found))
                whole = {p for of in (found[0].parts or {}).values() for p in of}
                own = {f"{found[0].name}.{projection}" for projection in found[0].projections}
                if option == "target_modules" and any(_matches(self.parameters, name) for name in own):
                    option, whole = "target_parameters", {".".join(name.split(".")[-2:]) for name in own}
                part = f"`{option}` names a part of the experts of {_listed(names)} only"
                how = f"they are quantized together. Name all of it ({', '.join(sorted(whole))})"
                if option == "target_parameters" and self._names_nothing_else():
                    raise ValueError(f"{part}, and nothing else is to be converted; {how}.")
                warnings.warn(f"{part}, so all of them stay as they are: {how}, or none.", stacklevel=2)
        if self.parameters:
            config.target_parameters = None  # PEFT would wrap them
        if config.target_modules == ALL_LINEAR or not (self.more or self.by_part):
            return
        inside = tuple(f"{name}." for name in self.layers)
        modules = [name for name, _ in model.named_modules() if not name.startswith(inside)]
        if not isinstance(config.target_modules, str):
            spent = {e for e in self.by_part if not any(_matches({e}, name) for name in modules)}
            spent |= {e for e in config.target_modules or () if any(_matches({e}, name) for name in self.layers)}
            left = (set(config.target_modules or ()) - spent) | self.more
            config.target_modules = left or config.target_modules  # where nothing is left, PEFT says so
        elif any(_matches(config.target_modules, name) for name in self.layers):
            others = {n for n in modules if n not in self.layers and _matches(config.target_modules, n)}
            config.target_modules = others | self.more
        else:
            config.target_modules = "|".join([f"(?:{config.target_modules})", *map(re.escape, sorted(self.more))])

    def _names_nothing_else(self) -> bool:
        """Whether `target_modules` holds what `target_parameters` does (`LRQATConfig` does so where it is empty), and
        no experts but those that are named in part are meant."""
        targets = self.config.target_modules
        return not isinstance(targets, str) and set(targets or ()) <= self.parameters and not self.more


def _listed(names: list[str]) -> str:
    return f"{names[0]!r}" if len(names) == 1 else f"{len(names)} layers, e.g. {names[0]!r},"


def _matches(entries: Any, key: str) -> bool:
    """Whether a name is among `target_modules`, `exclude_modules` or the like, as PEFT looks for it."""
    if isinstance(entries, str):
        return re.fullmatch(entries, key) is not None
    return any(key == entry or key.endswith(f".{entry}") for entry in entries)
