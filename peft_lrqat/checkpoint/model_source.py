"""A `Source` over a model in memory: merged, or with adapters that are merged one layer at a time as they are read."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..formats.record import KEY, Record
from ..formats.source import LayerInfo, Source
from ..grid import GridTensor


class ModelSource(Source):
    """A merged model, or a PeftModel of this package's methods. The model is not changed.

    Raises:
        ValueError: there is no quantized layer, or adapters of another kind are in the way.
    """

    def __init__(self, model: Any) -> None:
        """
        Args:
            model: an nn.Module with a `config`, or a PeftModel.
        """
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
        self._modules = dict(_walk(base, ""))
        self._quantized: dict[str, Any] = {n: m for n, m in self._modules.items() if hasattr(m, "grid_tensor")}
        if not self._quantized:
            hint = ""
            if getattr(base.config, "quantization_config", None) is not None:
                hint = " It was loaded from a quantized checkpoint; give that checkpoint's folder instead."
            raise ValueError(f"The model ({type(base).__name__}) has no layer of this package's merged kinds.{hint}")
        self._options = adapter
        self._describe(base, adapter)
        self.float_linears = [
            name
            for name, module in self._modules.items()
            if isinstance(getattr(module, "original_module", module), nn.Linear) and name not in self._quantized
        ]
        self.tied = self._aliases()
        self._untie(base)
        self._check_names(base)

    def _describe(self, base: Any, adapter: Any) -> None:
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
        if adapter is not None:
            self.origin = adapter.base_model_name_or_path or self.origin
            record = adapter.record()
        if record is not None:
            self.recipe, self.scale_dtype = record.recipe, record.scale_dtype

    def grids(self) -> dict[str, LayerInfo]:
        return {name: self._info(name) for name in self._quantized}

    def layer(self, name: str) -> GridTensor:
        module = self._quantized[name]
        return module.grid_tensor(options=self._options) if _is_adapted(module) else module.grid_tensor()

    def zero_point(self, name: str) -> torch.Tensor | None:
        if self._info(name).grid.symmetric:
            return None
        module = self._quantized[name]  # zero points are not trained
        return (module.frozen if _is_adapted(module) else module).zero_point

    def _info(self, name: str) -> LayerInfo:
        module = self._quantized[name]
        return module.info_for(self._options) if _is_adapted(module) else module.info

    @torch.no_grad()
    def floats(self, packed: Collection[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        for name, module in self._modules.items():
            for key, tensor in self._own(name, module, name not in packed):
                if key not in self.tied:
                    yield key, tensor

    def _own(self, name: str, module: Any, dense: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """What one module, without its children, has in the state dict."""
        prefix = name + "." if name else ""
        if name in self._quantized:
            if dense:
                info = self._info(name)
                weight = self.layer(name).dequantize(info.dtype)
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

    def _check_names(self, base: Any) -> None:
        """Raise ValueError if files of this architecture name or cut tensors in another way than the model."""
        if not isinstance(base, PreTrainedModel):
            return
        here: dict[str, torch.Tensor] = {}
        for name, module in self._modules.items():
            if name in self._quantized:
                info = self._info(name)
                here[name + ".weight"] = torch.empty(info.out_features, info.in_features, device="meta")
            else:
                here |= {key: t.to("meta") for key, t in module.named_parameters(name, recurse=False)}
        in_files = revert_weight_conversion(base, dict(here))
        if changed := sorted(here.keys() - in_files.keys()):
            raise ValueError(
                f"Files of {type(base).__name__} hold some tensors otherwise than the model does ({changed[0]!r}), of "
                "which transformers' save_pretrained takes care. Merge, save_pretrained, and export that folder."
            )

    def _untie(self, base: Any) -> None:
        """A head that was trained apart from the embeddings is not tied to them in the checkpoint either."""
        expected = getattr(base, "all_tied_weights_keys", None) or {}
        if getattr(self.config, "tie_word_embeddings", False) and expected:
            self.config.tie_word_embeddings = all(a in self.tied or b in self.tied for a, b in expected.items())


def _is_adapted(module: nn.Module) -> bool:
    """Whether a layer with `grid_tensor` has adapters, which merging puts into its integers."""
    return isinstance(module, BaseTunerLayer)


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of a model as merging would leave it: the modules that own tensors, PEFT's wrappers resolved."""
    if hasattr(module, "grid_tensor"):
        yield name, module
        return
    if isinstance(module, ModulesToSaveWrapper):
        active = [adapter for adapter in module.active_adapters if adapter in module.modules_to_save]
        yield from _walk(module.modules_to_save[active[0]] if active else module.original_module, name)
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
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}".lstrip("."))


def adapter_source(folder: Path) -> ModelSource:
    """Load an adapter's base model and the adapter.

    Raises:
        ValueError: the base model cannot be loaded, is not the one that the adapter was trained on, or the adapter is
            of another method.
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
    try:
        if config.wants_quantized_base:
            base = load_quantized(config.base_model_name_or_path or "", model_class=loader._target_class)
            model = loader._target_peft_class.from_pretrained(base, str(folder))
        else:
            model = loader.from_pretrained(str(folder), dtype="auto")
    except OSError as error:
        raise ValueError(
            f"The base model {config.base_model_name_or_path!r} of the adapter in {str(folder)!r} cannot be loaded "
            f"({str(error).splitlines()[0]}). Load it yourself, put the adapter on it with PeftModel.from_pretrained, "
            "and export that model."
        ) from error
    source = ModelSource(model)
    source.tokenizer = next(
        (str(place) for place in (folder, Path(config.base_model_name_or_path or ""))
         if (place / "tokenizer_config.json").exists()), None,
    )  # fmt: skip
    return source
