"""What the configurations of both methods share: a grid, and checks of the adapter's file before it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from peft import PeftType, TaskType
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from ...checkpoint.adapter_card import AdapterFacts, write_adapter_card
from ...checkpoint.card import base_name, training_rows
from ...formats import bitnet, compressed_tensors
from ...formats.record import Record
from ...grid import Grid
from ...ops.activations import PER_TOKEN, Activations
from ...ops.kv_cache import CACHE_RULES
from .absent import OF_OTHERS
from .extras import ADDED_BY_PEFT
from .fingerprint import QUANTIZED_BASE
from .loading import LoadingConfig
from .rules import FLOAT_BITS, Rule, check_fields, is_index

#: PEFT's word for all linear layers but the output layer: what is converted where nothing else is said.
ALL_LINEAR = "all-linear"


class GridConfig(PeftConfigMixin):
    """What the configurations of this package share: a grid, and checks of the adapter's file before it is loaded.

    Fields that are described here are described so in both configurations (`field_help.py`). They declare them, because
    the order of a dataclass's fields is that of its arguments.

    Attributes:
        method: the method's name, for messages.
        quantizes: the classes of modules that can be adapted.
        rules: what each field may hold.
        contents: what the parts of a layer hold in an adapter's file.
        meaning: fields that say what an adapter's tensors compute, and that neither the tensors nor the base tell.
        absent: options that it does not have, and users may bring along -> what is said to them.
        act_bits (int | None): 8 or 4: the input of every converted layer is rounded to so many bits, with a scale for
            every token. It happens in training and in the checkpoint. It needs a symmetric grid. Default: `None`, float
            inputs.
        act_bits_pattern (dict[str, int | None] | None): Other `act_bits` for some layers: patterns of names, as in
            LoRA's `rank_pattern`, -> 8, 4, or None (16) for float. `{"down_proj": 8}` beside `act_bits=4` keeps the
            input with most outliers at 8 bits. Default: `None`.
        act_group_size (int | None): How many consecutive inputs of a token share a scale. Default: `None`, all of them.
        act_rule (str): Whose arithmetic rounds inputs. "transformers": compressed-tensors', with 127.5 steps (4 bits:
            7.5) for the largest magnitude. "vllm": that of vLLM's kernels, with 127 (7) steps. Default:
            `"transformers"`.
        act_scale (str): "dynamic": the scales of inputs are found anew for every token. "static": the input of a
            layer has one scale, which layers with one input have in common, `calibrate_activations` sets, training
            learns (LSQ, arXiv 1902.08153), and the checkpoint stores. "static" is for W8A8 only. Default: `"dynamic"`.
        kv_bits (int | None): 8 or 4: keys and values are rounded to so many bits where they are written to the cache,
            with a scale for every token and head. It happens in training and wherever the merged model runs. Default:
            `None`, a float cache.
        kv_rule (str): Whose arithmetic rounds the cache. "transformers": that of the `kv_cache_scheme` in the merged
            checkpoint, which vLLM refuses. "vllm": that of vLLM with `--kv-cache-dtype int8_per_token_head` (or
            `int4_per_token_head`). Default: `"transformers"`.
        base_dtype (str | None): Set by the conversion: the dtype in which the base is used ("float32", "bfloat16"
            or "float16"). It is saved with the adapter, so that its base is opened alike, whatever the dtype of the
            base's file is. Default: `None`.
        base_head (dict[str, Any] | None): Set when an adapter is saved with the head of a classifier: the names of the
            classes (`labels`, a list) and the `problem_type` of the model's configuration. The base is opened with so
            many classes, and gets their names. Default: `None`.
        base_fingerprint (str | None): Set by the conversion: a checksum of the float weights that the adapter was made
            for. It is saved with the adapter, which is loaded on these weights only. Default: `None`.
        base_checksum (str | None): Set by the conversion: a checksum of the integers that the base was converted to. It
            is saved with the adapter, which is loaded over these integers only. Default: `None`.
        trainings (list[dict[str, str]] | None): Set when an adapter is saved: what Trainers have done to it, as model
            cards say it. The cards of what the adapter is merged into later have it from here. Default: `None`.
    """

    method: ClassVar[str]
    task_type: Any
    quantizes: ClassVar[tuple[type, ...]]
    rules: ClassVar[dict[str, Rule]]
    contents: ClassVar[dict[str, Any]]
    meaning: ClassVar[tuple[str, ...]] = (
        *("act_bits", "act_bits_pattern", "act_group_size", "act_rule", "act_scale"),
        *("kv_bits", "kv_rule"),
    )
    absent: ClassVar[dict[str, str]] = OF_OTHERS
    inference_mode: bool
    target_modules: Any
    bits: int
    group_size: int
    container_bits: int | None
    scale_dtype: str
    signed_scales: bool
    range_method: Any
    range_p: float
    base_model_name_or_path: str | None
    base_dtype: str | None
    base_head: dict[str, Any] | None
    base_fingerprint: str | None
    base_checksum: str | None
    trainings: list[dict[str, str]] | None
    modules_to_save: list[str] | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    export_format: str | None = "compressed-tensors"
    act_bits: int | None = None
    act_group_size: int | None = None
    act_bits_pattern: dict[str, int | None] | None = None
    act_rule: str = "transformers"
    kv_bits: int | None = None
    kv_rule: str = CACHE_RULES[0]
    act_scale: str = "dynamic"
    headroom: float = 1.0
    offload_base: bool = False

    @property
    def grid(self) -> Grid:
        """The grid that the fields describe."""
        raise NotImplementedError

    @property
    def stored_grid(self) -> Grid:
        """The grid of the merged checkpoint."""
        return self.grid

    @property
    def stored_bits(self) -> int:
        """Width of the codes in the merged checkpoint."""
        return self.container_bits or self.stored_grid.code_bits

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of some layers are rounded."""
        return self._act_bits(self.act_bits) is not None or any(map(self._act_bits, self._act_pattern.values()))

    @property
    def _act_pattern(self) -> dict[str, int | None]:
        return self.act_bits_pattern or {}

    @staticmethod
    def _act_bits(bits: int | None) -> int | None:
        """A value of `act_bits` or its pattern, with None for float, which users may call 16 as well."""
        return None if bits == FLOAT_BITS else bits

    def activations_of(self, name: str) -> Activations | None:
        """How the input of the module of that name is rounded, or None."""
        key = get_pattern_key(list(self._act_pattern), name)
        bits = self._act_bits(self._act_pattern.get(key, self.act_bits))
        if bits is None:
            return None
        if self.export_format == bitnet.NAME:
            return bitnet.ACTIVATIONS
        engine = "vllm" if self.act_rule == "vllm" else compressed_tensors.NAME
        found = Activations(engine, bits, self.act_group_size or PER_TOKEN, self.act_scale == "static")
        return replace(found, rule=compressed_tensors.engine_rule(found, self.stored_grid, self.stored_bits))

    def learns_input_scale(self, name: str) -> bool:
        """Whether the module of that name has a fixed scale for its input."""
        activations = self.activations_of(name)
        return activations is not None and activations.static

    def describe_activations(self) -> str:
        """How inputs are rounded, for `recipe`; nothing where they are not."""
        if not self.rounds_inputs:
            return ""
        bits = f"{self.act_bits}-bit activations" if self.act_bits else "float activations"
        parts = [f"{key}: {value or FLOAT_BITS}" for key, value in self._act_pattern.items()]
        parts += [f"groups of {self.act_group_size}"] if self.act_group_size else []
        parts += ["rounded as vLLM does"] if self.act_rule == "vllm" else []
        parts += ["learned fixed scales"] if self.act_scale == "static" else []
        return bits + (f" ({', '.join(parts)})" if parts else "")

    @property
    def wants_quantized_base(self) -> bool:
        """Whether the adapter was made for a base that was quantized already."""
        return str(self.base_fingerprint).startswith(QUANTIZED_BASE)

    def require_base(self) -> None:
        """Note what a loaded adapter says of its base and its past: the fields become those of the model at hand."""
        self._required_fingerprint, self._required_checksum = self.base_fingerprint, self.base_checksum
        self._required_dtype, self._noted_trainings = self.base_dtype, self.trainings or ()

    @property
    def is_new(self) -> bool:
        """Whether the adapter is to be trained from its start, and is no file's."""
        return not self.inference_mode and self._required_fingerprint is None

    def require_any_base(self) -> None:
        """Forget which base a loaded adapter asks for."""
        self._required_fingerprint = self._required_checksum = None

    @property
    def kept_as(self) -> str:
        """How the frozen base is kept: a `downcast` of `ops.stored_base`."""
        raise NotImplementedError

    @property
    def ranges(self) -> tuple[str, float, bool, float]:
        """How the first scales of a float weight are chosen: method, exponent, whether they have signs, headroom."""
        return self.range_method, self.range_p, self.signed_scales, self.headroom

    @property
    def keeps_places(self) -> bool:
        """Whether adapters begin where the float weights lay, not only at their codes (`ops/latent.py`)."""
        return False

    def conversion_device(self) -> torch.device | None:
        """Where layers are converted, if not where they are."""
        return None

    def for_loading(self) -> LoadingConfig:
        """Make a `quantization_config` for `from_pretrained`, with which a model is quantized while it is loaded.

        Only one tensor at a time is then float, apart from the embeddings and what is not targeted. `get_peft_model`
        with this configuration takes the layers as they are. Every number is that of a model that was loaded in float.

        Returns:
            A `LoadingConfig`, with a copy of this configuration.

        Raises:
            ValueError: a field is out of range, or needs the float weights later.

        Examples:
            >>> from peft import get_peft_model
            >>> from peft_lrqat import LRQATConfig
            >>> from transformers import AutoModelForCausalLM
            >>> config = LRQATConfig(task_type="CAUSAL_LM")
            >>> loading = config.for_loading()
            >>> quantized = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", quantization_config=loading)
            >>> model = get_peft_model(quantized, config)
        """
        self.check_fields()
        self.check_options()
        return LoadingConfig(self)

    @property
    def quant_method(self) -> str:
        """There is none. `from_pretrained` asks its `quantization_config` for it, and is to say what belongs there."""
        name = type(self).__name__
        raise AttributeError(
            f"`quantization_config` is of type {name}, which is for `get_peft_model` and the trainers' `peft_config`. "
            "To quantize a model while it is loaded, give `quantization_config=config.for_loading()`; otherwise leave "
            "it out."
        )

    @property
    def bytes_per_weight(self) -> float:
        """How large a converted layer is, without scales and low-rank factors."""
        raise NotImplementedError

    def record(self) -> Record:
        """What a merged checkpoint's config.json says about the training."""
        base = base_name(self.base_model_name_or_path)[0] if self.base_model_name_or_path else None
        return Record(self.stored_grid, self.scale_dtype, self.recipe(), base=base)

    def recipe(self) -> str:
        """What a merged checkpoint says about the training: plain text, which cards make links of papers in."""
        raise NotImplementedError

    @property
    def trained_beside(self) -> list[str]:
        """What is trained in float, for `recipe`, but for the heads that PEFT adds by itself."""
        return [name for name in self.modules_to_save or () if name not in ADDED_BY_PEFT]

    def check_options(self) -> None:
        """Raise ValueError if an option is out of range, or options contradict each other."""
        raise NotImplementedError

    def check_fields(self) -> None:
        """Complete the choice of modules, and raise ValueError unless every field obeys its rule (`rules.py`)."""
        if self.target_modules is None:
            self.target_modules = ALL_LINEAR
        check_fields(self, self.rules)
        for name in ("target_modules", "exclude_modules"):  # PEFT's own kind of such a list
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        elif isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` is {self.layers_to_transform!r}, but `target_modules` is the regular "
                f"expression {self.target_modules!r}, which chooses the layers itself. Give a list of names, or "
                "'all-linear'."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"`layers_pattern` is {self.layers_pattern!r} without `layers_to_transform`, the indices of the layers."
            )

    def check_activations(self) -> None:
        """Choose the container of layers whose inputs are rounded: 8 bits where a row shares a scale and it costs
        little, because all engines multiply int8 by int8.

        Raises:
            ValueError: options of rounded inputs contradict others, or no input is rounded.
        """
        if not self.rounds_inputs:
            for name, default in (("act_group_size", None), ("act_rule", "transformers"), ("act_scale", "dynamic")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)!r}, but no input is rounded. Give `act_bits` (8 or 4), or "
                        f"leave `{name}` out."
                    )
            return
        if self.export_format == bitnet.NAME:
            return
        if not self.grid.symmetric:
            raise ValueError(
                f"`act_bits` is {self.act_bits} with `symmetric=False`, but transformers decompresses a model with "
                "zero points while loading, and then rounds no activations. Use `symmetric=True`."
            )
        fixed = self.act_scale == "static"
        if self.container_bits is None and self.group_size <= 0 and (self.stored_grid.code_bits > 4 or fixed):
            self.container_bits = 8
        if not fixed:
            return
        wrong = {
            "act_bits": self._act_bits(self.act_bits) not in (None, 8),
            "act_bits_pattern": 4 in self._act_pattern.values(),
            "act_group_size": self.act_group_size is not None,
            "act_rule": self.act_rule != "transformers",
            "group_size": self.group_size > 0,
            "container_bits": self.container_bits != 8,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ValueError(
                f"`{name}` is {getattr(self, name)!r} with `act_scale='static'`, but engines take fixed scales as W8A8 "
                "only: 8-bit activations beside int8 codes per channel or tensor (`group_size` -1 or 0, "
                "`container_bits` 8 or None), by transformers' rule. Use these, or act_scale='dynamic'."
            )

    def check_cache(self) -> None:
        """Raise ValueError if nothing serves a KV cache of `kv_bits` beside `export_format`."""
        if self.kv_bits is not None and self.kv_rule == "transformers" and self.export_format == bitnet.NAME:
            raise ValueError(
                f"`kv_bits` is {self.kv_bits} with `export_format='bitnet'`, whose files cannot say that transformers "
                "is to round the cache. Use `kv_rule='vllm'`, or `export_format='compressed-tensors'`."
            )

    def is_older_adapter(self) -> bool:
        """Whether the fields are those of an adapter that was made before there was `signed_scales`."""
        return self.signed_scales is None and (self.base_fingerprint, self.base_checksum) != (None, None)

    @property
    def has_sides(self) -> bool:
        """Whether the grid has one level more on one side, and the ranges look at that."""
        return self.grid.symmetric and not self.grid.ternary and self.range_method != "absmean"

    def check_signed_scales(self) -> None:
        """Raise ValueError if `signed_scales` has no meaning on the grid."""
        if not self.signed_scales or self.has_sides:
            return
        if self.grid.ternary or self.range_method == "absmean":
            raise ValueError(
                "`signed_scales` is True, which lets every scale choose the side on which the grid has one level more, "
                f"but {'the ternary grid has as many on both' if self.grid.ternary else 'absmean looks at no side'}. "
                f"Leave it out{'' if self.grid.ternary else ', or use range_method=' + repr('lp')}."
            )
        raise ValueError(
            "`signed_scales` is True with `symmetric=False`, but zero points place the levels already. Use one of the "
            "two."
        )

    def experts_problem(self) -> str:
        """Why experts of a mixture cannot be quantized with this configuration; "" if they can."""
        raise NotImplementedError

    def check_container(self) -> None:
        """Raise ValueError if the codes of the checkpoint do not fit into `container_bits`."""
        least = self.stored_grid.code_bits
        if self.container_bits is not None and not (
            is_index(self.container_bits) and least <= self.container_bits <= 8
        ):
            raise ValueError(
                f"`container_bits` is {self.container_bits!r}, but the codes of the checkpoint "
                f"({self.stored_grid.describe()}) take {least} bits; it must be an integer from {least} to 8, or None."
            )

    def expected_shapes(self, name: str, out_features: int, in_features: int, experts: int = 1) -> dict[str, tuple]:
        """Tensor name -> shape of what an adapter's file holds for the layer of that name; `experts`: of so many."""
        raise NotImplementedError

    def check_values(self, widths: dict[str, int]) -> None:
        """Raise ValueError if the adapter's file holds values that this configuration cannot mean.

        Args:
            widths: name of a layer -> its number of input features.
        """

    def forget_unmatched(self, names: Collection[str]) -> None:
        """Take out of patterns what they say of none of these layers, as far as no user wrote it there."""

    def makes_reference(self, name: str, others: Mapping[str, Any]) -> bool:
        """Whether TRL adds the adapter `name` as the reference of a trained one, whose values it copies afterwards.

        It is called "ref" then, and has the other's configuration.

        Args:
            others: adapter -> its configuration.
        """
        return name == "ref" and any(other == self for key, other in others.items() if key != name)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Load as PEFT's `from_pretrained` does. A local adapter file is checked here, before any model is touched.

        Args:
            pretrained_model_name_or_path (str): an adapter's folder, or its repository on the Hub.
            subfolder (str | None): the folder within it.
            **kwargs (Any): PEFT's.

        Returns:
            The configuration.

        Raises:
            ValueError: the adapter's weight file is truncated or not a safetensors file; a field of the configuration
                is out of range.
        """
        path = os.path.join(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        shapes = _adapter_shapes(path)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ValueError as error:
            where = os.path.join(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
            raise ValueError(f"{where!r} cannot be used: {error}") from error
        if isinstance(config, GridConfig):
            config._adapter_shapes = shapes
            config._adapter_path = None if shapes is None else path
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save as PEFT's `save_pretrained` does. The model card says how to load the adapter.

        Args:
            save_directory (str): the adapter's folder.
            **kwargs (Any): PEFT's.
        """
        super().save_pretrained(save_directory, **kwargs)
        # the first pattern that matches a name counts, but PEFT sorts them
        path = os.path.join(save_directory, CONFIG_NAME)
        with open(path) as file:
            saved = json.load(file)
        with open(path, "w") as file:
            json.dump(
                {**saved, **{name: getattr(self, name) for name in saved if name.endswith("_pattern")}}, file, indent=2
            )
        write_adapter_card(save_directory, self.facts(), self._saved_as)

    def facts(self) -> AdapterFacts:
        """What an adapter's model card says."""
        rows, datasets = training_rows(self.trainings or ())
        return AdapterFacts(
            method=self.method,
            peft_type=PeftType(self.peft_type).value,
            bits=self.bits,
            grid=self.grid.describe(),
            base=self.base_model_name_or_path or "",
            task=None if self.task_type is None else TaskType(self.task_type).value,
            quantized_base=self.wants_quantized_base,
            dtype=self.base_dtype,
            classes=len(self.base_head["labels"]) if self.base_head else None,
            recipe=self.recipe(),
            rows=rows,
            datasets=tuple(datasets),
        )

    # The adapter's file, and what it holds (name -> shape), if this config was loaded from a folder; not saved.
    _adapter_path = cast("str | None", None)  # without annotations: they are no fields
    _adapter_shapes = cast("dict[str, tuple[int, ...]] | None", None)
    # How many layers got the adapter.
    _converted = cast("int", 0)
    # The adapter's name, noted when its tensors are collected for saving.
    _saved_as = cast("str", "default")
    # `trainings` of the file, and of the adapter whose tensors were loaded into this one.
    _noted_trainings = cast("Sequence[dict[str, str]]", ())
    _earlier_trainings = cast("Sequence[dict[str, str]]", ())


def current_key(key: str) -> str:
    """The name that a tensor of an adapter's file has today; early files left the scale shifts' `.weight` out."""
    return f"{key}.weight" if key.endswith("_scale_shift") else key


def _adapter_shapes(path: str) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes in a local adapter file (its header is read, not its data); None if there is no such file."""
    if not os.path.isfile(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {current_key(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The adapter file {path!r} is truncated or damaged ({error}). Nothing was loaded; copy or download it "
            "again."
        ) from error
