"""Checks, before a model is changed, of modules that are trained in float beside an adapter."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection
from typing import Any

from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ...modules.packed import FLOAT_NAME
from ...modules.trained_vectors import HALF
from .layer import MergingLayer

# The heads that PEFT trains in float by itself, whether the model has them or not. For the last two tasks it thinks of
# them only when they are adapted already.
_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
_GENERATES = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
ADDED_BY_PEFT = {name for names in _HEADS.values() for name in names}

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def task_heads(model: Any, task: str | None, every: bool) -> list[str]:
    """Names of the modules that a task's head consists of: new, so trained in float and saved with the adapter.

    Args:
        every: whether to name whatever lies outside of the model's backbone (T5's `classification_head`, DistilBERT's
            `pre_classifier`), or only the heads that PEFT knows.
    """
    if task not in _HEADS:
        return []
    heads = list(_HEADS[TaskType(task)])
    backbone = getattr(model, "base_model", model)
    if every and backbone is not model:
        heads += [
            name
            for name, child in model.named_children()
            if child is not backbone and not isinstance(child, _CONTAINERS) and any(True for _ in child.parameters())
        ]
    return list(dict.fromkeys(heads))


#: The classes of transformers whose heads are new when a model is fine-tuned for a task.
_CLASSIFIES = re.compile(r"For\w*(Classification|QuestionAnswering)")


def warn_of_converted_head(model: Any, targets: dict[str, nn.Module], config: Any) -> None:
    """Warn if 'all-linear' takes the head of a classifier for one of the layers, because no task says what it is.

    It holds random weights, which would be rounded, and with low-rank factors alone would mostly stay what they are.
    """
    if config.task_type in _HEADS or not _CLASSIFIES.search(type(model).__name__):
        return
    backbone = getattr(model, "base_model", model)
    outside = [name for name, child in model.named_children() if child is not backbone]
    if backbone is model:  # which has encoder and decoder beside the head
        outside = [name for name in outside if name in ADDED_BY_PEFT]
    heads = [name for name in outside if any(f"{target}.".startswith(f"{name}.") for target in targets)]
    if heads:
        warnings.warn(
            f"`task_type` is {config.task_type!r}, so that the head of {type(model).__name__} ({', '.join(heads)}) is "
            "quantized as any layer. A new head is random: to train it in float, give its task (`task_type='SEQ_CLS'`, "
            f"'TOKEN_CLS' or 'QUESTION_ANS'), or `modules_to_save={heads}`.",
            stacklevel=2,
        )


def head_of(model: Any, config: Any) -> dict[str, Any] | None:
    """What an adapter's file says of the classes that its head tells apart (`base_head`); None: it has no such head."""
    own: Any = getattr(model, "config", None)
    names = getattr(own, "id2label", None)
    if not config.modules_to_save or config.task_type == TaskType.QUESTION_ANS or not names:
        return None
    labels = [names.get(i, _label(i)) for i in range(len(names))]
    if config.task_type not in _HEADS and labels == [_label(i) for i in range(2)]:  # what every configuration has
        return None
    return {"labels": labels, "problem_type": getattr(own, "problem_type", None)}


def warn_of_unsaved(model: nn.Module, config: Any) -> None:
    """Warn of weights that are trained and that no adapter's file holds: those outside of adapted and copied modules.

    Whoever resumes the training, or loads the adapter, has those of the base again, without a word. PEFT saves biases
    outside where `bias` is "all".
    """
    held = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for parameter in module.parameters()
    }
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not parameter.is_meta and id(parameter) not in held
        if not (getattr(config, "bias", None) == "all" and name.endswith("bias"))
    ]
    if lost:
        modules = sorted({name.split(".")[-2] for name in lost if "." in name})
        warnings.warn(
            f"{len(lost)} weights outside of the adapter are trained, e.g. {lost[0]!r}, and its file does not hold "
            "them: a training that is resumed from it, and whatever loads it, has the base's again. Name them in the "
            f"configuration instead (`modules_to_save={modules}`), or save the whole model with `merge_and_unload()`.",
            stacklevel=2,
        )


def check_merged_extras(model: nn.Module, adapters: Collection[str]) -> None:
    """Raise ValueError if merging these adapters would leave the `modules_to_save` of others in the model: PEFT takes
    those of the active adapter, whichever is merged.
    """
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        there, wanted = (
            [adapter for adapter in some if adapter in module.modules_to_save]
            for some in (module.active_adapters, adapters)
        )
        if set(there) != set(wanted):
            raise ValueError(
                f"The adapters {sorted(adapters)} are to be merged, but {name!r}, which adapters train in float, would "
                f"be that of {there[0] if there else 'the base'!r}, which is active. Activate what is merged "
                "(`model.set_adapter(name)`), and leave `adapter_names` out."
            )


def restore_extras(model: nn.Module) -> None:
    """Have the base's own modules where adapters train others in float: PEFT's `unload` leaves the trained ones."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])


def round_extras(model: nn.Module, adapter: str, state_dict: dict[str, Any]) -> None:
    """Round what a file has in fp32 for modules that hold less, and would be given it as it is (`low_cpu_mem_usage`).

    Args:
        state_dict: tensors by their names in the model; changed in place.
    """
    for name, module in trained_beside(model, adapter).items():
        for key, parameter in module.named_parameters(f"{name}.modules_to_save.{adapter}"):
            if key in state_dict and parameter.dtype in HALF:
                state_dict[key] = state_dict[key].to(parameter.dtype)


def trained_beside(model: nn.Module, adapter: str) -> dict[str, nn.Module]:
    """The modules that an adapter trains in float (`modules_to_save`), by the names of those that they stand for."""
    return {
        name: module.modules_to_save[adapter]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


def warn_of_adapters_inside(model: Any, options: dict[str, Any]) -> None:
    """Warn if a model is to be saved with layers of adapters inside, as no `from_pretrained` reads it: not the
    PeftModel, nor what merging makes of it, but the model between the two.

    Args:
        options: of `save_pretrained`; with a `state_dict` whose names are others, the caller has seen to it.
    """
    layer = next((name for name, module in model.named_modules() if isinstance(module, MergingLayer)), None)
    if layer is None or getattr(model, "_hf_peft_config_loaded", False):  # then transformers saves the adapter
        return
    given = options.get("state_dict")
    if given is None or not given.keys().isdisjoint(model.get_submodule(layer).state_dict(prefix=f"{layer}.")):
        warnings.warn(
            f"This {type(model).__name__} has adapters inside, and its folder will have their layers under names of "
            f"their own ('{layer}.base_layer...'), which `from_pretrained` does not read: it would begin with random "
            "weights there. Save the adapter (the PeftModel's `save_pretrained`) or what `merge_and_unload()` returns.",
            stacklevel=3,
        )


def warn_of_layers_of_others(model: nn.Module, adapter: str) -> None:
    """Warn if an adapter was trained beside layers that other adapters have put on the grid, and that are float where
    its file is loaded alone.
    """
    layers = [module for module in model.modules() if isinstance(module, MergingLayer)]
    others = sum(adapter not in layer.adapter_options for layer in layers)
    if 0 < others < len(layers):
        warnings.warn(
            f"Adapter {adapter!r} has {len(layers) - others} layers; {others} more are rounded in this model, for "
            "other adapters. Where its file is loaded alone they are float, and the model computes something else than "
            "here: load an adapter that has them first, and this one beside it.",
            stacklevel=2,
        )


def warn_of_unnamed_base(model: nn.Module, config: Any) -> None:
    """Warn, once, where an adapter belongs to integers that were made in memory, and names what they were made of."""
    made = next((module for module in model.modules() if FLOAT_NAME in vars(module)), None)
    name = config.base_model_name_or_path
    if made is None or not config.wants_quantized_base or (vars(made)[FLOAT_NAME] or None) != (name or None):
        return
    delattr(made, FLOAT_NAME)
    warnings.warn(
        f"The adapter belongs to integers that were made in memory, but its file names {name!r} as its base, and could "
        "not be loaded. Save the base, too: after training, before anything is merged, "
        "`model.unload().save_pretrained(FOLDER)`, and write FOLDER into adapter_config.json "
        "(`base_model_name_or_path`). The next time, `model.save_pretrained(FOLDER)` and `model.name_or_path = FOLDER` "
        "before `get_peft_model`.",
        stacklevel=2,
    )


def adopt_labels(model: Any, config: Any) -> None:
    """Give a model the names of classes that an adapter brings along, where it has none of its own.

    A model with another number of them is warned of: PEFT will say of the head's tensors that they do not fit.
    """
    own: Any = getattr(model, "config", None)
    head, names = config.base_head, getattr(own, "id2label", None)
    if head is None or not names:
        return
    labels = head["labels"]
    if len(labels) != len(names):
        warnings.warn(
            f"The head of this adapter tells {len(labels)} classes apart, and that of the model {len(names)}. Load the "
            f"base with `num_labels={len(labels)}`.",
            stacklevel=2,
        )
        return
    if all(name == _label(i) for i, name in names.items()):
        own.id2label = dict(enumerate(labels))
        own.label2id = {name: i for i, name in enumerate(labels)}
    if getattr(own, "problem_type", None) is None:
        own.problem_type = head.get("problem_type")


def _label(index: int) -> str:
    """transformers' name of a class that nobody has named."""
    return f"LABEL_{index}"


def check_extras(model: nn.Module, targets: dict[str, nn.Module], config: Any) -> None:
    """Raise ValueError if what is trained beside the adapter does not fit the model, or the adapter's file."""
    _check_task(model, config)
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_modules_to_save(modules, targets, config)
    _warn_of_parted_embeddings(model, modules, config)
    _check_tokens(model, modules, targets, config)


def _check_task(model: nn.Module, config: Any) -> None:
    """Raise ValueError if a new adapter is to generate text with a model that cannot; PEFT would fail afterwards."""
    if config.is_new and config.task_type in _GENERATES and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type` is {TaskType(config.task_type).value!r}, but {type(model).__name__} generates no text. Give "
            "the task that it has ('SEQ_CLS', 'TOKEN_CLS', 'QUESTION_ANS', 'FEATURE_EXTRACTION'), or leave `task_type` "
            "out."
        )


def _check_modules_to_save(modules: dict[str, nn.Module], targets: dict[str, nn.Module], config: Any) -> None:
    for wanted in config.modules_to_save or ():
        found = {name: module for name, module in modules.items() if name and name.endswith(wanted)}  # as PEFT does
        if not found and wanted not in ADDED_BY_PEFT:
            raise ValueError(
                f"`modules_to_save` names {wanted!r}, but no module of the model is called so, and nothing would be "
                "trained for it. Correct the name, or leave it out."
            )
        for name, module in found.items():
            if isinstance(module, _CONTAINERS):
                raise ValueError(
                    f"`modules_to_save` names {name!r}, a {type(module).__name__}, which has no forward to be trained. "
                    "Name the modules in it."
                )
            # PEFT leaves what it saves out of this adapter's targets; the layers of others are there all the same
            if name in targets or any(isinstance(part, MergingLayer) for part in module.modules()):
                raise ValueError(
                    f"`modules_to_save` names {name!r}, which is quantized, or has quantized layers in it: one weight "
                    "cannot be trained both ways. Leave one of them out (`exclude_modules`)."
                )
            _check_saved(name, module, config)


def _warn_of_parted_embeddings(model: nn.Module, modules: dict[str, nn.Module], config: Any) -> None:
    """PEFT trains a copy of what it is to save; what was tied to it then keeps its weight, frozen, without a word."""
    ends = tuple(config.modules_to_save or ())
    pair = [_embeddings(model, side) for side in ("input", "output")]
    weights = [getattr(module, "weight", None) for module in pair]
    if not ends or weights[0] is None or weights[0] is not weights[1] or getattr(config, "ensure_weight_tying", False):
        return
    names = [name for module in pair for name, other in modules.items() if other is module]
    saved = [name for name in names if name.endswith(ends)]
    kept = [name for name in names if not name.endswith(ends)]
    if saved and kept:
        tying = ", or say `ensure_weight_tying=True`" if hasattr(config, "ensure_weight_tying") else ""
        warnings.warn(
            f"`modules_to_save` names {saved[0]!r}, to which {kept[0]!r} is tied: a copy of the first is trained, and "
            "the second keeps its weight, frozen. To train both, untie them before (docs/guides/troubleshooting.md) "
            f"and name both{tying}.",
            stacklevel=2,
        )


def _embeddings(model: Any, side: str) -> nn.Module | None:
    """Return the model's "input" or "output" embeddings; None where it has none, or transformers does not know them."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        return getattr(model, f"get_{side}_embeddings")()
    return None


def _check_saved(name: str, module: nn.Module, config: Any) -> None:
    """Raise ValueError unless the adapter's file, if there is one, holds a module that is loaded from it."""
    shapes = config._adapter_shapes
    if shapes is None or isinstance(module, AuxiliaryTrainingWrapper):
        return
    for key in module.state_dict():
        ending = f"{name.rpartition('.')[2]}.{key}"  # `key_mapping` may rename what comes before
        if not any(saved.endswith(ending) for saved in shapes):
            raise ValueError(
                f"`modules_to_save` names {name!r}, but the adapter file has no '{ending}'. The file is not complete, "
                "or belongs to another adapter_config.json: copy or download it again."
            )


def _check_tokens(model: Any, modules: dict[str, nn.Module], targets: dict[str, nn.Module], config: Any) -> None:
    wanted = config.trainable_token_indices
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        embedding = _embeddings(model, "input")
        name = next((name for name, module in modules.items() if module is embedding), "embed_tokens")  # as PEFT has it
        wanted = {name: wanted}
    for layer, indices in wanted.items():
        found = {name: module for name, module in modules.items() if name and name.endswith(layer)}
        if not found:
            raise ValueError(
                f"`trainable_token_indices` names {layer!r}, but no module of the model is called so. Name its "
                "embedding table, or give a list of indices for the input embeddings."
            )
        for name, module in found.items():
            if any(name.endswith(saved) for saved in config.modules_to_save or ()):
                raise ValueError(
                    f"{name!r} is both in `modules_to_save` and in `trainable_token_indices`. Train all of it, or some "
                    "tokens: leave one of them out."
                )
            if name in targets or isinstance(module, BaseTunerLayer):
                raise ValueError(
                    f"`trainable_token_indices` names {name!r}, which is quantized: a token's row cannot be trained in "
                    "float beside it. Leave one of them out (`exclude_modules`)."
                )
            table = getattr(module, "original_module", module)
            rows = getattr(table, "num_embeddings", getattr(table, "out_features", None))
            if rows is not None and indices and max(indices) >= rows:
                raise ValueError(
                    f"`trainable_token_indices` has {max(indices)}, but {name!r} has {rows} rows. Count from 0; for "
                    "new tokens, call `model.resize_token_embeddings(...)` first."
                )


def check_reference(name: str, config: Any, others: dict[str, Any]) -> None:
    """Raise ValueError if the adapter `name` is to be TRL's reference of another one, and TRL would copy only a part of
    it.

    Args:
        others: adapter -> its configuration.
    """
    if config.trainable_token_indices is not None and config.makes_reference(name, others):
        raise ValueError(
            f"TRL makes the adapter {name!r} as the reference of a trained one, but its copy leaves out what was "
            "trained by `trainable_token_indices`, so the reference would be another model. Give the trainer a "
            "reference (`ref_model=...`, for DPO and KTO), go without one (`beta=0`, for GRPO), or train the embedding "
            "whole (`modules_to_save`)."
        )
