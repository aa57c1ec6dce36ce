"""`LRQATConfig`: a `LoraConfig` with a grid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import LoftQConfig, LoraConfig, LoraRuntimeConfig
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...arguments import with_suggestions
from ...grid import PER_CHANNEL, PER_TENSOR, Grid
from ...ops.stored_base import DOWNCASTS
from ...ranges import RANGE_METHODS
from ...registration import ensure_peft_type
from ..common.absent import OF_OTHERS
from ..common.adapter_file import FACTOR
from ..common.config import ALL_LINEAR, GridConfig
from ..common.field_help import with_help
from ..common.loading import LoadingConfig
from ..common.rules import FLAG, NUMBER, POSITIVE, RANK, SHARED, Rule, one_of, optional, pattern

# LoraConfig options that have no meaning inside a rounding, with the reason that the error gives.
_REFUSED = {
    "use_dora": "DoRA rescales a float weight; the grid's learned scales take that part (`learn_scales=True`)",
    "lora_bias": "a bias of lora_B would lie outside the rounding; train the layer's own bias with `bias='lora_only'`",
    "layer_replication": "every replica would hold its own packed copy; replicate the layers before adapting",
    "megatron_config": "Megatron's parallel linear layers are not supported",
    "eva_config": "EVA initializes for a float base",
    "corda_config": "CorDA rewrites the base weight",
    "lora_ga_config": "LoRA-GA rewrites the base weight",
    "velora_config": "VeLoRA changes what LoRA's own forward keeps",
    "alora_invocation_tokens": "an adapter inside the rounding acts on all tokens",
    "use_qalora": "QA-LoRA is another method, with its adapter outside the rounding",
    "monteclora_config": "MonteCLoRA samples adapters outside the rounding",
    "use_bdlora": "block-diagonal LoRA is not implemented inside the rounding",
    "arrow_config": "Arrow routes between adapters per token; a rounded weight belongs to all tokens",
    "kasa_config": "KaSA truncates the base weight",
}


_OTHER = "It is an option of LowBitSRConfig"

# Options of LowBitSRConfig that it does not have.
_ABSENT: dict[str, str] = {
    **OF_OTHERS,
    **dict.fromkeys(("rank", "lora_rank", "lora_r"), "Did you mean `r`?"),
    "alpha": "Did you mean `lora_alpha`?",
    "init_weights": "Did you mean `init_lora_weights`?",
    "seed": f"{_OTHER}, which rounds at random; LR-QAT rounds to nearest. Leave it out.",
    "keep_base": "The base is what adapters are added to, and stays. Leave it out; `downcast='int'` makes it smallest.",
    "forward_bits": f"{_OTHER}. Leave it out: `bits` is the grid of forward and checkpoint.",
    "error_feedback": f"{_OTHER}, whose optimizer rounds; LR-QAT's factors are floats. Leave it out.",
    **dict.fromkeys(
        ("headroom", "grow_scales"),
        f"{_OTHER}, for weights that grow in training. Leave it out; `learn_scales=True` lets scales follow.",
    ),
    "export_format": (
        "`merge_and_unload` makes compressed-tensors of it, and `peft_lrqat.export(model, folder, format=...)` any "
        "format. Leave it out."
    ),
}

# The default of lora_alpha / r (with `use_rslora`: lora_alpha / sqrt(r)), in grid steps: see docs/results/accuracy.md.
_STRENGTH = 16

#: The value of `learn_scales` with which one change is learned for all scales of an output channel.
BY_CHANNEL = "channel"

# Grid options that may be left open, and what they are on a float base.
_GRID_DEFAULTS: dict[str, Any] = {"bits": 4, "group_size": 128, "symmetric": True, "scale_dtype": "auto"}


@with_help
@with_suggestions
@dataclass
class LRQATConfig(GridConfig, LoraConfig):
    """Configuration of LR-QAT (arXiv 2406.06385): a `LoraConfig` with a grid.

    Fields of `LoraConfig` keep their meaning, with one exception: `lora_alpha / r` counts *grid steps*. An entry 1 of
    `lora_alpha / r * lora_B @ lora_A` moves a weight by one level. `config.for_loading()` quantizes a model while it is
    loaded.

    Attributes:
        bits (int | None): Width of the weight grid, from 2 to 8 bits. Default: `4`; on a quantized base, its own.
        group_size (int | None): How many consecutive input features share a scale. It divides `in_features` of every
            converted layer. -1: a scale for every output channel. 0: one scale for the tensor. Default: `128`; -1 where
            inputs are rounded (`act_bits`); on a quantized base, its own.
        symmetric (bool | None): False adds a frozen integer zero point, in grid steps, to every scale. 2-bit grids want
            that. Default: `True`; on a quantized base, as it is there.
        signed_scales (bool | None): Whether a scale may be negative, and so choose the side of zero on which a
            symmetric grid has its extra level (4 bits: -8 to 7, or -7 to 8). Rounding then loses less, at no cost.
            Default: `True`; False where `symmetric=False`; on a quantized base, whether that has negative scales.
        scale_dtype (str | None): What the checkpoint stores for a scale. Training sees exactly that number. "auto":
            numbers that are exact in both bf16 and fp16, for any engine. "bf16", "fp16", "fp32": numbers that are exact
            in that type. Default: `"auto"`; on a quantized base, the first of these four that holds its scales.
        container_bits (int | None): Width of the codes in the merged checkpoint, from `bits` to 8. 4 puts 2- and 3-bit
            grids where 4-bit kernels read them. Default: `None`, which is `bits`; with rounded inputs it becomes 8
            where a scale serves a channel or the tensor, and `bits` is 5 or more or `act_scale` is "static".
        downcast (str | None): How the frozen base is kept, in grid steps. "fx8": 8-bit fixed point, 1 byte a weight.
            "int": the rounded codes, `bits` / 8 bytes. "bf16", "fp16": 2 bytes. "fp32": 4 bytes. Default: `"fx8"`;
            "int" at 8 bits, at `r=0`, and on a quantized base.
        range_method (str): Where the first scales come from. "lp": the scale with the least sum of rounding errors to
            the power of `range_p`. "minmax": the one that covers every weight. Default: `"lp"`.
        range_p (float): Exponent of `range_method="lp"`, above 0. Multiples of 0.5 are fast. Default: `2.5`.
        learn_scales (bool | str): Whether scales are trained, as relative changes. True: each by itself. False: none.
            "channel": all groups of an output channel by one factor, which makes the backward cheaper (from 4 bits on,
            in layers without a bias); `lora_alpha / r` then counts steps of the channel's largest scale. Without groups
            that is the same as True. Default: `True`.
        r (int): Rank of the adapter inside the rounding. 0: there is none. The integers stay as they are, only the
            scales are trained (PEQA, arXiv 2305.14152), and `lora_alpha` means nothing. That is meant for a base whose
            integers are good already, such as that of `preprocess_blockwise`. Default: `32`.
        lora_alpha (int | float | None): `lora_alpha / r` (with `use_rslora`: `lora_alpha / sqrt(r)`) scales the
            adapter, in grid steps. Default: `512`, 16 steps at rank 32. Where it is left out, it and `alpha_pattern`
            are set so that it is 16 steps in every layer, whatever `r`, `rank_pattern` and `use_rslora` are.
        rank_pattern (dict[str, int]): Other ranks for some layers, 0 among them: patterns of names -> rank. Default:
            `{}`.
        alpha_pattern (dict[str, float]): Other `lora_alpha` for some layers: patterns of names -> value. Default: `{}`.
        use_rslora (bool): Divide `lora_alpha` by sqrt(r) in place of r. Default: `False`.
        init_lora_weights (bool | str): True: the adapter starts at zero. "loftq": it starts at the best fit of what
            rounding lost, for `downcast="int"`. False: it starts with random moves of more than half of the weights
            (rank 0: of the scales), for tests. LoRA's other values are refused. Default: `True`.
        loftq_config (dict | LoftQConfig): For `init_lora_weights="loftq"`; `loftq_iter` must be 1. Default: `{}`.
        target_modules (str | list[str] | None): Names, or a regular expression, of the layers to convert: `nn.Linear`,
            GPT-2's `Conv1D`, and `nn.Embedding` where it is named. "all-linear": all linear layers and experts of
            mixtures, but not the output layer. What is not named stays float. Default: `"all-linear"`.
        target_parameters (list[str] | None): Names of the parameters that hold a mixture's experts, such as
            "experts.gate_up_proj": another way to choose them. Default: `None`.
        exclude_modules (str | list[str] | None): Names, or a regular expression, of layers that stay float. Default:
            `None`.
        layers_to_transform (int | list[int] | None): Indices, from 0, of the decoder layers to convert, where
            `target_modules` is a list or "all-linear". Default: `None`, all of them.
        layers_pattern (str | list[str] | None): Name of the `nn.ModuleList` that `layers_to_transform` counts in, if
            PEFT does not find it. Default: `None`.
        modules_to_save (list[str] | None): Names of further modules that are trained in float and saved with the
            adapter. The head of a classifier is added by itself (`task_type`). Default: `None`.
        trainable_token_indices (list[int] | dict[str, list[int]] | None): Token embeddings that are trained in float:
            ids of tokens, or the name of an embedding -> ids. Default: `None`.
        bias (str): Which biases are trained, in float. "none"; "all"; "lora_only": those of the converted layers.
            Default: `"none"`.
        ensure_weight_tying (bool): Keep tied what `modules_to_save` or `trainable_token_indices` train and the model
            ties. Default: `False`.
        act_bits, act_bits_pattern, act_group_size, act_rule, act_scale, kv_bits, kv_rule: Rounded inputs, and a rounded
            KV cache. `GridConfig` describes them.
        offload_base (bool): Keep the base of the converted layers in the CPU's memory, from which it is copied to the
            GPU for each use, a block of the model ahead. The GPU then holds two blocks of it. It changes no number, and
            is not saved. Default: `False`.
        runtime_config (LoraRuntimeConfig): With `ephemeral_gpu_offload=True`, layers of a model in the CPU's memory are
            converted on the accelerator. It is not saved.
        task_type (TaskType | str | None): PEFT's, such as "CAUSAL_LM". It chooses the class of the PEFT model.
            "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" train the head in float. Default: `None`.
        inference_mode (bool): Whether an adapter is loaded frozen. Default: `False`.
        base_dtype, base_head, base_fingerprint, base_checksum, trainings: What an adapter notes of its base and its
            past. `GridConfig` describes them.

    PEFT sets `peft_type`, `auto_mapping`, `peft_version`, `base_model_name_or_path` and `revision`. `fan_in_fan_out`,
    `megatron_core` and `qalora_group_size` change nothing: a layer says by itself how its weight lies.

    Refused, because they have no meaning inside a rounding: `lora_dropout` other than 0, `use_dora`, `lora_bias`,
    `layer_replication`, `megatron_config`, `eva_config`, `corda_config`, `lora_ga_config`, `velora_config`,
    `alora_invocation_tokens`, `use_qalora`, `monteclora_config`, `use_bdlora`, `arrow_config` and `kasa_config`. The
    error gives the reason.

    Raises:
        ValueError: a field is out of range, is refused, or contradicts another one. The message names the field, its
            value and what is allowed.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig
        >>> from transformers import AutoModelForCausalLM
        >>> config = LRQATConfig(bits=4, group_size=128, r=16, task_type="CAUSAL_LM")
        >>> config.lora_alpha
        256
        >>> model = get_peft_model(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"), config)
        >>> merged = model.merge_and_unload()  # after training; a TRL trainer takes `peft_config=config`
        >>> merged.save_pretrained("merged")
    """

    method = "LR-QAT"
    quantizes = (nn.Linear, Conv1D, nn.Embedding)
    contents: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("lora_A", "lora_B", "lora_scale_shift", "lora_act_scale"), FACTOR
    )
    meaning = ("lora_alpha", "alpha_pattern", "use_rslora", *GridConfig.meaning)
    absent: ClassVar[dict[str, str]] = _ABSENT
    rules: ClassVar[dict[str, Rule]] = {
        **SHARED,
        "target_parameters": Rule(
            "it must be a list of names of parameters, or None", SHARED["modules_to_save"].allows
        ),
        "r": RANK,
        "lora_alpha": optional(POSITIVE),
        "rank_pattern": pattern(RANK),
        "alpha_pattern": pattern(POSITIVE),
        "lora_dropout": NUMBER,
        "init_lora_weights": Rule(
            "LR-QAT knows True, False and 'loftq'. The others rewrite the base weight or assume an adapter outside the "
            "rounding",
            one_of(True, False, "loftq").allows,
        ),
        "loftq_config": Rule("it must be a LoftQConfig, or a dictionary", lambda v: isinstance(v, (dict, LoftQConfig))),
        "runtime_config": Rule("it must be a LoraRuntimeConfig", lambda v: isinstance(v, LoraRuntimeConfig)),
        "bias": one_of("none", "all", "lora_only"),
        "symmetric": optional(FLAG),
        "downcast": optional(one_of(*DOWNCASTS)),
        "range_method": one_of(*RANGE_METHODS),
        "signed_scales": optional(FLAG),
        "scale_dtype": optional(SHARED["scale_dtype"]),
        "learn_scales": one_of(True, False, BY_CHANNEL),
        **dict.fromkeys(("use_rslora", "fan_in_fan_out", "ensure_weight_tying", "offload_base"), FLAG),
    }

    target_modules: list[str] | str | None = ALL_LINEAR
    r: int = 32
    lora_alpha: int = None  # type: ignore[assignment]  # None exists only until __post_init__
    init_lora_weights: bool | Literal["loftq"] = field(
        default=True, metadata=LoraConfig.__dataclass_fields__["init_lora_weights"].metadata
    )  # with what PEFT reads there
    bits: int = None  # type: ignore[assignment]  # None exists only until __post_init__; so for the next ones
    group_size: int = None  # type: ignore[assignment]  # as for bits
    symmetric: bool = None  # type: ignore[assignment]  # as for bits
    downcast: Literal["fx8", "int", "bf16", "fp16", "fp32"] | None = None
    range_method: Literal["lp", "minmax"] = "lp"
    range_p: float = 2.5
    signed_scales: bool = None  # type: ignore[assignment]  # as for bits
    learn_scales: bool | Literal["channel"] = True
    scale_dtype: Literal["auto", "bf16", "fp16", "fp32"] = None  # type: ignore[assignment]  # as for bits
    container_bits: int | None = None
    act_bits: int | None = None
    act_group_size: int | None = None
    act_bits_pattern: dict[str, int | None] | None = None
    act_rule: Literal["transformers", "vllm"] = "transformers"
    kv_bits: int | None = None
    kv_rule: Literal["transformers", "vllm"] = "transformers"
    act_scale: Literal["dynamic", "static"] = "dynamic"
    offload_base: bool = False

    base_dtype: str | None = None
    base_head: dict[str, Any] | None = None
    base_fingerprint: str | None = None
    base_checksum: str | None = None
    trainings: list[dict[str, str]] | None = None

    def __post_init__(self) -> None:
        # what `_set_strength` makes of a `lora_alpha` that was left open, and of which `alpha_pattern`
        self._default_alpha: tuple | None = None
        self._given_alpha: dict[str, float] = {}
        self.check_fields()
        if self.is_older_adapter():
            self.signed_scales = False
        # what the user left open, and what it was set to: a base that is quantized already decides it (`adopt`)
        self._open = {
            name: None for name in (*_GRID_DEFAULTS, "downcast", "signed_scales") if getattr(self, name) is None
        }
        self.adopt_defaults()
        self.check_options()
        self.require_base()
        # LoraConfig would look for PEFT's own LoftQ here (which needs scipy); ours is in `loftq.py`
        hidden = {"init_lora_weights": True, "loftq_config": {}}
        if self.target_modules == ALL_LINEAR:  # PEFT knows no layers of it
            hidden |= {"layers_to_transform": None, "layers_pattern": None}
        own = {name: getattr(self, name) for name in hidden}
        if self.loftq_config and self.init_lora_weights != "loftq":
            warnings.warn("`loftq_config` does nothing without `init_lora_weights='loftq'`.", stacklevel=3)
        vars(self).update(hidden)
        super().__post_init__()
        vars(self).update(own)
        self.peft_type = ensure_peft_type("LRQAT")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are saved: those that say how this process runs are not."""
        return {name: value for name, value in super().to_dict().items() if name != "offload_base"}

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def adopt_defaults(self) -> None:
        """Give what was left open its value on a float base."""
        self.adopt(**{**_GRID_DEFAULTS, **({"group_size": PER_CHANNEL} if self.rounds_inputs else {})})
        wide = isinstance(self.bits, (int, float)) and self.bits > 7  # what else it may be is refused later
        whole = wide or not self.has_factors  # without factors nothing ever asks for the fraction of a step
        self.adopt(downcast="int" if whole else "fx8", signed_scales=bool(self.symmetric))

    def adopt(self, **found: Any) -> list[str]:
        """Take a quantized base's values for the options that were left open.

        Returns:
            The options among `found` that were set to something else.
        """
        for name in self._open.keys() & found.keys():
            if getattr(self, name) == self._open[name]:  # else the user has set the attribute since
                setattr(self, name, found[name])
                self._open[name] = found[name]
        return [name for name, value in found.items() if getattr(self, name) != value]

    def conversion_device(self) -> torch.device | None:
        """Where layers are converted, if not where they are: `LoraRuntimeConfig(ephemeral_gpu_offload=True)`.

        Raises:
            ValueError: it is asked for, and there is no accelerator.
        """
        if not self.runtime_config.ephemeral_gpu_offload:
            return None
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if device is None:
            raise ValueError(
                "`ephemeral_gpu_offload` is True, but torch finds no accelerator on which layers could be converted. "
                "Leave it out to convert them where they are."
            )
        return device

    def recipe(self) -> str:
        ranges = (
            f"ranges by lp (p = {self.range_p:g})" if self.range_method == "lp" else f"ranges by {self.range_method}"
        )
        ranges += " with signed scales" if self.signed_scales else ""
        if self.wants_quantized_base:
            ranges = "integers and scales of a quantized base"
        scales = "the scales" if self.learn_scales else "the scales of inputs"
        trained = f"LR-QAT (arXiv 2406.06385) at rank 0: the integers stay, {scales} are trained (arXiv 2305.14152), "
        if self.has_factors:
            divisor = "sqrt(r)" if self.use_rslora else "r"
            trained = (
                f"LR-QAT (arXiv 2406.06385): rank {self.r}, "
                f"lora_alpha {self.lora_alpha} (over {divisor}, in {self.adapter_unit}), "
            )
        return (
            f"{trained}base kept as {self.downcast}, {ranges}"
            + (f", {self.describe_activations()}" if self.rounds_inputs else "")
            + (f", {self.kv_bits}-bit KV cache as {self.kv_rule} has it" if self.kv_bits is not None else "")
            + (f", trained in float beside: {', '.join(self.trained_beside)}" if self.trained_beside else "")
        )

    @property
    def kept_as(self) -> str:
        return str(self.downcast)  # None exists only until the configuration is made

    def for_loading(self) -> LoadingConfig:
        if self.init_lora_weights == "loftq" and self._adapter_shapes is None:
            raise ValueError(
                "`init_lora_weights` is 'loftq', which needs the float weights when the adapter is made, but a model "
                "that is quantized while it is loaded has none. Use True, or load the float model."
            )
        return super().for_loading()

    @property
    def bytes_per_weight(self) -> float:
        return {"fx8": 1, "int": self.grid.code_bits / 8, "bf16": 2, "fp16": 2, "fp32": 4}[str(self.downcast)]

    @property
    def ranks(self) -> set[int]:
        """The ranks that layers may have."""
        return {self.r, *(self.rank_pattern or {}).values()}

    @property
    def has_factors(self) -> bool:
        """Whether some layers have low-rank factors."""
        return any(self.ranks)

    def rank_of(self, name: str) -> int:
        """The rank in the layer of that name; 0: it has no factors."""
        pattern: dict[str, int] = self.rank_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), name), self.r)

    def expected_shapes(self, name: str, out_features: int, in_features: int, experts: int = 1) -> dict[str, tuple]:
        rank = self.rank_of(name) * experts
        shapes: dict[str, tuple] = {}
        if rank:
            shapes |= {"lora_A.weight": (rank, in_features), "lora_B.weight": (out_features, rank)}
        if self.learn_scales:
            shapes["lora_scale_shift.weight"] = self.shift_shape(
                *self.grid.scale_shape(out_features * experts, in_features)
            )
        if self.learns_input_scale(name):
            shapes["lora_act_scale.weight"] = (1,)
        return shapes

    def experts_problem(self) -> str:
        if self.group_size == PER_TENSOR:
            return (
                "`group_size` is 0, but a scale for all experts of a layer is no grid of any format; use -1 or groups"
            )
        if self.init_lora_weights == "loftq":
            return "`init_lora_weights` is 'loftq', which is made for single layers; use True"
        return ""

    def shift_shape(self, rows: int, groups: int) -> tuple[int, int]:
        """The shape of the scales' learned change, where the scales have shape (rows, groups)."""
        return (rows, 1 if self.learn_scales == BY_CHANNEL else groups)

    @property
    def adapter_unit(self) -> str:
        """What c lora_B lora_A counts."""
        by_row = self.learn_scales == BY_CHANNEL and self.group_size > 0
        return "steps of the row's largest scale" if by_row else "grid steps"

    def check_fields(self) -> None:
        if self.rank_pattern is None or self.alpha_pattern is None:  # as PEFT allows
            self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        if self.target_parameters and isinstance(self.target_modules, (list, set)) and not self.target_modules:
            self.target_modules = list(self.target_parameters)  # as layers are what experts become
        super().check_fields()

    def check_options(self) -> None:
        """Raise ValueError if an option is out of range, or options contradict each other."""
        self.check_fields()
        if Grid(self.bits, self.group_size, self.symmetric).ternary:
            raise ValueError(
                "`bits` is 1.58; LR-QAT's grids have 2 to 8 bits (whole numbers). Ternary weights are trained by "
                "LowBitSRConfig."
            )
        self.check_container()
        if self.bits == 8 and self.downcast == "fx8":
            raise ValueError(
                "`downcast='fx8'` has 8 - bits fraction bits, so none at `bits=8`. Use 'int' (1 byte) or "
                "'fp16' (2 bytes)."
            )
        self.check_activations()
        self.check_cache()
        self.check_signed_scales()
        if self.lora_dropout:
            raise ValueError(
                f"`lora_dropout` is {self.lora_dropout}, but the adapter acts on the weight, inside the rounding: "
                "there is no adapter input to drop. Use 0."
            )
        iterations = _of_loftq(self.loftq_config, "loftq_iter", 1)
        if self.init_lora_weights == "loftq" and iterations != 1:
            raise ValueError(
                f"`loftq_config` asks for loftq_iter={iterations}; only 1 is supported (as in the paper): with more, "
                "the frozen codes would depend on the SVD and could not be recomputed when the adapter is loaded."
            )
        self._check_loftq_bits()
        self._check_without_factors()
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"LR-QAT does not support `{name}`: {reason}.")
        self._set_strength()

    def _check_loftq_bits(self) -> None:
        """Raise ValueError for `loftq_bits` of another grid. 4, LoftQConfig's default, may be nobody's word."""
        bits = _of_loftq(self.loftq_config, "loftq_bits", 4)
        if self.init_lora_weights == "loftq" and bits not in (4, self.bits or 4):
            raise ValueError(
                f"`loftq_config` asks for loftq_bits={bits}, but the grid has `bits={self.bits or 4}`, and the adapter "
                f"makes up for what rounding to that loses. Set `bits={bits}`, or leave `loftq_bits` out."
            )

    def _check_without_factors(self) -> None:
        """Raise ValueError where nothing has a rank, and an option makes sense with low-rank factors only."""
        if self.has_factors:
            return
        if self.init_lora_weights == "loftq":
            raise ValueError(
                "`init_lora_weights` is 'loftq' with `r=0`, but it fits low-rank factors to what rounding lost, and at "
                "rank 0 there are none. Use True, or a rank of 1 or more."
            )
        if not self.learn_scales and not (self.rounds_inputs and self.act_scale == "static"):
            raise ValueError(
                "`r` is 0 with `learn_scales=False`, which leaves nothing to train: at rank 0 only the scales are. Use "
                "`learn_scales=True`, or a rank of 1 or more."
            )

    def _set_strength(self) -> None:
        """Set a `lora_alpha` that was left open, and `alpha_pattern`, so that the strength of every layer is 16 steps.

        Both are written out, so that an adapter's file says what was trained, whatever the default may become.
        """
        given, ranks = dict(self.alpha_pattern or {}), self.rank_pattern or {}
        if self.lora_alpha is None:
            self._given_alpha = given
        elif (self.lora_alpha, given) != self._default_alpha:  # somebody's own
            return
        divisor: Any = math.sqrt if self.use_rslora else int
        self.lora_alpha = _STRENGTH * divisor(self.r or 1)  # of rank 0 nobody asks
        by_rank = {key: _STRENGTH * divisor(r) for key, r in ranks.items() if r and key not in self._given_alpha}
        self.alpha_pattern = {**self._given_alpha, **by_rank}
        self._default_alpha = self.lora_alpha, dict(self.alpha_pattern)

    def forget_unmatched(self, names: Collection[str]) -> None:
        """Take out of `alpha_pattern` what `_set_strength` wrote there for ranks of none of these layers.

        PEFT warns of unmatched keys in both patterns, and the user has written one of them.
        """
        if self._default_alpha != (self.lora_alpha, self.alpha_pattern):
            return
        matched = {key for key in self.rank_pattern or () for name in names if get_pattern_key([key], name) == key}
        kept = matched | self._given_alpha.keys()
        self.alpha_pattern = {key: alpha for key, alpha in (self.alpha_pattern or {}).items() if key in kept}
        self._default_alpha = self.lora_alpha, dict(self.alpha_pattern)


def _of_loftq(loftq_config: Any, name: str, default: int) -> int:
    if isinstance(loftq_config, dict):
        return loftq_config.get(name, default)
    return getattr(loftq_config, name, default)
