"""A `Source` over a model in memory: merged, or with adapters that are merged one layer at a time as they are read."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file

from ..formats.record import KEY, Record
from ..formats.source import LayerInfo, Source
from ..grid import GridTensor
from ..modules.architecture import float_names, loading, module_names, skeleton_of, tensor_names
from ..modules.experts import Experts
from ..modules.kv_cache import rounding_of
from ..modules.split_experts import ExpertPart, parts_of
from ..modules.trained_vectors import as_served
from . import hub
from .code import class_of


class AnotherBase(ValueError):
    """An adapter is put on other weights than those that it was trained on, or on these in another dtype."""


class ModelSource(Source):
    """A merged model, or a PeftModel of this package's methods. The model is not changed.

    Attributes:
        model: that model, without PEFT's wrapper.

    Raises:
        ValueError: there is no quantized layer, or adapters of another kind are in the way.
    """

    def __init__(self, model: Any, tokenizer: str | None = None) -> None:
        """
        Args:
            model: an nn.Module with a `config`, or a PeftModel.
            tokenizer: the folder of its tokenizer, if there is one.
        """
        self.tokenizer = tokenizer
        tuner: Any = (
            model.base_model if isinstance(model, PeftModel) else model if isinstance(model, BaseTuner) else None
        )
        base: Any = model if tuner is None else tuner.model
        if not isinstance(base, nn.Module) or getattr(base, "config", None) is None:
            raise ValueError(
                f"A model of transformers, a PeftModel or a folder is needed, but this is a {type(model).__name__}."
            )
        adapter = None
        if tuner is not None:
            adapter = tuner.peft_config[(tuner.active_adapters or list(tuner.peft_config))[0]]
            if not hasattr(adapter, "stored_grid"):
                raise ValueError(
                    f"The active adapter is of type {adapter.peft_type}, whose weights are floats: nothing was trained "
                    "on a grid. Export models adapted with LRQATConfig or LowBitSRConfig."
                )
        self.model = base
        self._modules = dict(_walk(base, ""))
        self._quantized: dict[str, Any] = {n: m for n, m in self._modules.items() if _is_quantized(m)}
        self._stack: tuple[Any, GridTensor | None] = (None, None)  # the experts that were read last
        if not self._quantized:
            hint = " Train it with LRQATConfig or LowBitSRConfig first, and give the trained or the merged model."
            if getattr(base.config, "quantization_config", None) is not None:
                hint = " It was loaded from a quantized checkpoint; give that checkpoint's folder instead."
            raise ValueError(f"The model ({type(base).__name__}) has no layer of this package's merged kinds.{hint}")
        for module in self._quantized.values():
            if _is_adapted(module):
                module.check_input_scale()
        self._options = adapter
        self._describe(base, tuner)
        self._files = module_names(base, self._quantized)
        if joined := [name for name, file in self._files.items() if file is None]:
            raise ValueError(
                f"Files of {type(base).__name__} hold {joined[0]!r} joined with other layers, or cut. Only what "
                "transformers writes does so with codes: merge, and use save_pretrained."
            )
        self._called = {file: name for name, file in self._files.items() if file is not None}
        self.modules = {file: name for file, name in self._called.items() if file != name}
        self.float_linears = float_names(base, self._modules, self._quantized)
        self.loading = loading(skeleton_of(base), [n for n in self._quantized if self._info(n).kind == "linear"])
        self.tied = self._aliases()
        self._untie(base)

    def _describe(self, base: Any, tuner: Any) -> None:
        self.config = copy.deepcopy(base.config)
        record = Record.of(self.config)
        for known in ("quantization_config", KEY):
            if hasattr(self.config, known):
                delattr(self.config, known)
        self.config.architectures = [type(base).__name__]
        self.config.dtype = base.dtype
        if base.can_generate():
            self.generation_config = copy.deepcopy(getattr(base, "generation_config", None))
        self.origin = getattr(base, "name_or_path", "") or type(base).__name__
        if tuner is not None:
            adapters = tuner.active_adapters or list(tuner.peft_config)
            self.origin = tuner.peft_config[adapters[0]].base_model_name_or_path or self.origin
            record = tuner.record(adapters)
        if record is not None:
            self.base, self.trainings = record.base, record.trainings
            self.recipe, self.scale_dtype = record.recipe, record.scale_dtype
            self.fixed_point_bits = record.fixed_point_bits
        self.cache = rounding_of(base)

    def grids(self) -> dict[str, LayerInfo]:
        return {file: self._info(name) for file, name in self._called.items()}

    def layer(self, name: str) -> GridTensor:
        return self._layer(self._called[name])

    def _layer(self, name: str) -> GridTensor:
        module = self._quantized[name]
        if not isinstance(module, ExpertPart):
            return self._read(module)
        if self._stack[0] is not module.stack:
            self._stack = (None, None)  # before the next is built
            self._stack = (module.stack, self._read(module.stack))
        whole = self._stack[1]
        assert whole is not None
        return module.of(whole)

    def _read(self, module: Any) -> GridTensor:
        return module.grid_tensor(options=self._options) if _is_adapted(module) else module.grid_tensor()

    def zero_point(self, name: str) -> torch.Tensor | None:
        module = self._quantized[self._called[name]]
        if self._info(self._called[name]).grid.symmetric:
            return None
        layer = module.stack if isinstance(module, ExpertPart) else module
        zero_point = (layer.frozen if _is_adapted(layer) else layer).zero_point  # which is not trained
        return module.of_rows(zero_point) if isinstance(module, ExpertPart) else zero_point

    def _info(self, name: str) -> LayerInfo:
        module = self._quantized[name]
        layer = module.stack if isinstance(module, ExpertPart) else module
        info = layer.info_for(self._options) if _is_adapted(layer) else layer.info
        return module.of_info(info) if isinstance(module, ExpertPart) else info

    @torch.no_grad()
    def floats(self, packed: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """The float tensors, one at a time, except those that files hold cut or joined."""
        called = tensor_names(self.model, dict(self.state(packed, values=False)))
        changed: dict[str, torch.Tensor] = {}
        for key, tensor in self.state(packed):
            name = called[key]
            if name is None:
                changed[key] = tensor
            else:
                yield name, tensor
        if changed:
            model: Any = self.model
            yield from revert_weight_conversion(model, changed).items()

    def state(self, packed: Collection[str] = (), values: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """As `floats`, under the names of the model.

        Args:
            values: whether weights are built; if not, they are on the meta device.
        """
        for name, module in self._modules.items():
            dense = name in self._quantized and self._files[name] not in packed
            for key, tensor in self._own(name, module, dense, values):
                if key not in self.tied:
                    yield key, tensor

    def _own(self, name: str, module: Any, dense: bool, values: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """What one module, without its children, has in the state dict."""
        prefix = name + "." if name else ""
        if name in self._quantized:
            if dense:
                info = self._info(name)
                weight = torch.empty(info.out_features, info.in_features, dtype=info.dtype, device="meta")
                if values:
                    weight = self._layer(name).dequantize(info.dtype)
                yield prefix + "weight", weight.t().contiguous() if info.kind == "conv1d" else weight
            bias = getattr(module, "frozen", module).bias
            if bias is not None:
                yield prefix + "bias", bias.detach()
        elif isinstance(module, TrainableTokensWrapper):
            yield prefix + "weight", module.weight.detach()
        else:
            own: dict[str, torch.Tensor] = {}
            module._save_to_state_dict(own, prefix, keep_vars=False)
            yield from own.items()

    def save_code(self, folder: Path, config: Any) -> None:
        if isinstance(self.model, PreTrainedModel) and self.model.is_remote_code():
            custom_object_save(self.model, folder, config=config)

    def _aliases(self) -> dict[str, str]:
        """Names of tensors that share storage with an earlier one: alias -> that one."""
        first: dict[tuple, str] = {}
        aliases = {}
        for name, module in self._modules.items():
            if name in self._quantized:
                continue
            inner = module.token_adapter.base_layer if isinstance(module, TrainableTokensWrapper) else module
            for key, tensor in inner.named_parameters(name, recurse=False):
                place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), inner is module)
                if tensor.numel() and place in first:
                    aliases[key] = first[place]
                first.setdefault(place, key)
        return aliases

    def _untie(self, base: Any) -> None:
        """A head that was trained apart from the embeddings is not tied to them in the checkpoint either."""
        expected = getattr(base, "all_tied_weights_keys", None) or {}
        if getattr(self.config, "tie_word_embeddings", False) and expected:
            self.config.tie_word_embeddings = all(a in self.tied or b in self.tied for a, b in expected.items())


def _is_adapted(module: nn.Module) -> bool:
    """Whether a layer with `grid_tensor` has adapters, which merging puts into its integers."""
    return isinstance(module, BaseTunerLayer)


def _is_quantized(module: Any) -> bool:
    return isinstance(module, ExpertPart) or hasattr(module, "grid_tensor")


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """(name, module) of a model as merging would leave it: the modules that own tensors, PEFT's wrappers resolved; for
    layers that hold all experts, the parts that files have of them."""
    if hasattr(module, "grid_tensor"):
        yield name, module
        return
    if isinstance(module, ModulesToSaveWrapper):
        active = [adapter for adapter in module.active_adapters if adapter in module.modules_to_save]
        yield from _walk(as_served(module.modules_to_save[active[0]]) if active else module.original_module, name)
        return
    if isinstance(module, TrainableTokensWrapper):
        yield name, module
        return
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ValueError(
            f"Module {name!r} carries a {type(module).__name__}, a float adapter that cannot be stored on the grid. "
            "Remove it (`unload()`), or export the model below it."
        )
    yield name, module
    if isinstance(module, Experts):
        yield from ((f"{name}.{part}", found) for part, found in parts_of(module).items())
    for child_name, child in module.named_children():
        if isinstance(module, Experts) and child_name in module.parts:
            continue
        yield from _walk(child, f"{name}.{child_name}".lstrip("."))


def load_adapter(folder: Path, trust_remote_code: bool = False) -> tuple[Any, str | None]:
    """Load an adapter's base model and the adapter: a PeftModel, and the folder of its tokenizer if there is one.

    Args:
        trust_remote_code: whether Python files beside the base model may be run.

    Raises:
        ValueError: the base model cannot be loaded, is not the one that the adapter was trained on, or the adapter is
            of another method, or its file lacks tensors.
    """
    from peft import auto

    from .load import load_quantized

    config = PeftConfig.from_pretrained(str(folder))
    if not hasattr(config, "stored_grid"):
        raise ValueError(
            f"The adapter in {str(folder)!r} is of type {config.peft_type}, whose weights are floats: nothing was "
            "trained on a grid."
        )
    kinds = [kind for name, kind in vars(auto).items() if name.startswith("AutoPeftModelFor")]
    by_task = {kind._target_peft_class.__name__.removeprefix("PeftModelFor"): kind for kind in kinds}
    names = {"CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification",
             "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering",
             "FEATURE_EXTRACTION": "FeatureExtraction"}  # fmt: skip
    loader = by_task.get(names.get(str(getattr(config.task_type, "value", config.task_type)), ""), auto.AutoPeftModel)
    place, trusted, classes = config.base_model_name_or_path or "", trust_remote_code, None
    try:
        described = None
        if loader._target_class is not None:
            described = AutoConfig.from_pretrained(place, revision=config.revision, trust_remote_code=trusted)
            if (described.architectures or [""])[0].endswith("ForConditionalGeneration"):
                # the task's Auto class may know another model of that configuration, or none
                own = {"_target_class": class_of(described, trusted) or loader._target_class}
                loader = type(loader.__name__, (loader,), own)
        classes = _classes(folder, config, loader._target_class, described, trusted)
        if config.wants_quantized_base:
            if described is not None and getattr(described, "quantization_config", None) is None:
                raise ValueError(
                    f"The adapter in {str(folder)!r} was trained on a quantized base, but `base_model_name_or_path` in "
                    f"its adapter_config.json is {place!r}, a float model. Put the folder there that the quantized "
                    "base was saved to. (`model.name_or_path = FOLDER` before an adapter is made writes it.)"
                )
            if classes is not None and described is not None:
                described.num_labels = classes
            base = load_quantized(
                place,
                model_class=loader._target_class,
                config=described,
                dtype=config.base_dtype or "auto",
                trust_remote_code=trusted,
            )
            with _complete(folder):
                model = loader._target_peft_class.from_pretrained(base, str(folder))
        else:
            options = {} if classes is None else {"num_labels": classes}
            with _complete(folder):
                model = _on_its_base(loader, folder, config.base_dtype, trust_remote_code=trusted, **options)
    except OSError as error:
        what = "Load"
        if not os.path.isabs(place) and not os.path.exists(place):
            what = f"If it is a folder, do this where the adapter was trained: {os.getcwd()!r} has none. Or load"
        raise ValueError(
            f"The base model {place!r} of the adapter in {str(folder)!r} cannot be loaded "
            f"({str(error).splitlines()[0]}). {what} it yourself, put the adapter on it with "
            "PeftModel.from_pretrained, and export that model."
        ) from error
    except RuntimeError as error:
        if config.base_head is None or "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"`base_head` in adapter_config.json of {str(folder)!r} names {classes} classes in `labels`, but the "
            f"adapter's tensors do not fit a model with so many ({str(error).splitlines()[-1].strip()}). Name every "
            "class of the head, or none (`base_head`: null)."
        ) from error
    return model, _tokenizer_place(folder, config)


@contextlib.contextmanager
def _complete(folder: Path) -> Iterator[None]:
    """Raise ValueError where PEFT only warns: what the file of the adapter lacks would be as it was before training."""
    missing = "Found missing adapter keys"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", missing)
            yield
    except UserWarning as warning:
        if missing not in str(warning):
            raise
        first = str(warning).partition("[")[2].split(",")[0].rstrip("]. ")
        raise ValueError(
            f"The file of the adapter in {str(folder)!r} lacks tensors that its adapter_config.json asks for, e.g. "
            f"{first}: it was saved after `merge_and_unload()`, or in part. Take an earlier checkpoint, or save it "
            "again before merging."
        ) from warning


def _classes(folder: Path, config: Any, model_class: Any, described: Any, trusted: bool) -> int | None:
    """How many classes the head of an adapter tells apart; None: it has no such head.

    Adapters of before it was noted (`base_head`) have as many rows as classes in the head's last tensor: in the one
    whose rows a model makes as many as it is told classes.

    Args:
        model_class: of the base.
        described: its configuration, None if unknown.
    """
    if config.base_head is not None:
        return len(config.base_head["labels"])
    shapes: dict[str, tuple] | None = type(config).from_pretrained(str(folder))._adapter_shapes
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS") or shapes is None or described is None:
        return None
    probe = copy.deepcopy(described)
    probe.num_labels = told = 7919  # a size that no other tensor has
    with torch.device("meta"):
        model = model_class.from_config(probe, trust_remote_code=trusted)
    heads = tuple(f".{name}" for name, tensor in model.named_parameters() if tensor.shape[0] == told)
    rows = {shape[0] for name, shape in shapes.items() if name.endswith(heads)}
    return rows.pop() if len(rows) == 1 else None


def _on_its_base(loader: Any, folder: Path, dtype: str | None, **options: Any) -> Any:
    """The adapter's model in the dtype of its base, or else in that of the base's file.

    Args:
        dtype: in which the base was used; None: it was not noted, and each is tried.
        **options: of `from_pretrained`.
    """
    first: AnotherBase | None = None
    for tried in (dtype, "auto") if dtype is not None else ("auto", "bfloat16", "float16"):
        try:
            with warnings.catch_warnings():
                # of a folder without a tokenizer, for which PEFT asks the Hub
                warnings.filterwarnings("ignore", "Unable to fetch remote file")
                return loader.from_pretrained(str(folder), dtype=tried, **options)
        except AnotherBase as error:
            first = first or error
    assert first is not None
    raise first


def _tokenizer_place(folder: Path, config: Any) -> str | None:
    """The adapter's folder, or the folder or repository of its base model: the first that holds a tokenizer."""
    base, name = config.base_model_name_or_path or "", "tokenizer_config.json"
    for place in (folder, Path(base)):
        if (place / name).exists():
            return str(place)
    if hub.repository(base) is None:
        return None
    found = cached_file(
        base,
        name,
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else f"{base}@{config.revision or 'main'}"
