"""`LRQATConfig`: a `LoraConfig` with a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import LoftQConfig, LoraConfig, LoraRuntimeConfig
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...grid import PER_CHANNEL, PER_TENSOR, Grid
from ...ops.stored_base import DOWNCASTS
from ...ranges import RANGE_METHODS
from ...registration import ensure_peft_type
from ..common.adapter_file import FACTOR
from ..common.config import ALL_LINEAR, GridConfig
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


# The default of lora_alpha / r (with `use_rslora`: lora_alpha / sqrt(r)), in grid steps: see docs/results/accuracy.md.
_STRENGTH = 16

#: The value of `learn_scales` with which one change is learned for all scales of an output channel.
BY_CHANNEL = "channel"

# Grid options that may be left open, and what they are on a float base.
_GRID_DEFAULTS: dict[str, Any] = {"bits": 4, "group_size": 128, "symmetric": True, "scale_dtype": "auto"}


@dataclass
class LRQATConfig(GridConfig, LoraConfig):
    """Configuration of LR-QAT (arXiv 2406.06385).

    Every field of `LoraConfig` keeps its meaning (`r`, `target_modules`, `rank_pattern`, `modules_to_save`, ...),
    except that `lora_alpha / r` counts *grid steps*: an entry 1 of `lora_alpha / r * lora_B @ lora_A` moves a weight
    one level (with `learn_scales="channel"`: by the largest scale of its row). Options of `LoraConfig` that cannot be
    honoured raise a ValueError.

    Raises:
        ValueError: a field is out of range, or options contradict each other.
    """

    method = "LR-QAT"
    quantizes = (nn.Linear, Conv1D, nn.Embedding)
    contents: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("lora_A", "lora_B", "lora_scale_shift", "lora_act_scale"), FACTOR
    )
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
        **dict.fromkeys(("use_rslora", "fan_in_fan_out", "ensure_weight_tying"), FLAG),
    }

    target_modules: list[str] | str | None = field(
        default=ALL_LINEAR,
        metadata={
            "help": "Names or a regular expression of the layers to quantize. 'all-linear': all linear layers but the "
            "output layer; what is left out stays float."
        },
    )
    r: int = field(default=32, metadata={"help": "Rank of the adapter inside the rounding."})
    lora_alpha: int = field(  # type: ignore[assignment]  # None exists only until __post_init__
        default=None,
        metadata={
            "help": "lora_alpha / r scales the adapter, in grid steps: entries of lora_B @ lora_A that reach "
            "r / lora_alpha move a weight one level. Default: 16 steps in every layer, whatever its rank, with "
            "`use_rslora` too; see docs/results/accuracy.md."
        },
    )
    bits: int = field(  # type: ignore[assignment]  # None exists only until __post_init__; so for the next ones
        default=None, metadata={"help": "Bits of the weight grid, 2 to 8. None: the quantized base's, or else 4."}
    )
    group_size: int = field(  # type: ignore[assignment]  # as for bits
        default=None,
        metadata={
            "help": "What shares a scale: this many consecutive input features (a divisor of in_features), -1 for an "
            "output channel, 0 for the whole tensor. None: the quantized base's, or else 128."
        },
    )
    symmetric: bool = field(  # type: ignore[assignment]  # as for bits
        default=None,
        metadata={
            "help": "False adds a frozen integer zero point to every scale, which 2-bit grids want. None: the "
            "quantized base's, or else True."
        },
    )
    downcast: Literal["fx8", "int", "bf16", "fp16", "fp32"] | None = field(
        default=None,
        metadata={
            "help": "How the frozen base is kept, in grid steps: 'fx8' (8-bit fixed point, 1 byte a weight; the "
            "default up to 7 bits), 'int' (packed codes, bits / 8 bytes; the default at 8 bits), 'bf16', 'fp16', "
            "'fp32'."
        },
    )
    range_method: Literal["lp", "minmax"] = field(
        default="lp", metadata={"help": "How the first scales are chosen: L_p grid search, or covering every weight."}
    )
    range_p: float = field(default=2.5, metadata={"help": "Exponent of the error norm of range_method='lp'."})
    signed_scales: bool = field(  # type: ignore[assignment]  # as for bits
        default=None,
        metadata={
            "help": "Whether the sign of a scale chooses the side of zero on which the symmetric grid has its extra "
            "level (-8 to 7, or -7 to 8): rounding loses less, above all at 2 to 4 bits in groups, at no cost. None: "
            "where the grid is symmetric; on a quantized base, whether that has such scales."
        },
    )
    learn_scales: bool | Literal["channel"] = field(
        default=True,
        metadata={
            "help": "Whether the scales are trained. True: each on its own. 'channel': one relative change for all "
            "groups of an output channel, whose gradient costs no dense product (from 4 bits on, without a bias); "
            "`lora_alpha / r` then counts steps of the channel's largest scale. Without groups the same as True."
        },
    )
    scale_dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default=None,  # type: ignore[arg-type]  # as for bits
        metadata={
            "help": "What the checkpoint will store for a scale; training sees exactly that. 'auto': numbers that are "
            "exact in bf16 and fp16, so that one checkpoint is exact in every engine. None: 'auto', or else the first "
            "of these that holds the scales of the quantized base."
        },
    )
    container_bits: int | None = field(
        default=None,
        metadata={
            "help": "Width of the codes in the merged checkpoint, >= bits. None: bits. 4 writes 2- and 3-bit grids "
            "into 4-bit containers, which more engines can load."
        },
    )
    act_bits: int | None = field(
        default=None,
        metadata={
            "help": "8 or 4: the input of every quantized layer is rounded to that many bits per token, in training "
            "and in the checkpoint. Needs a symmetric grid; `group_size` is -1 then, if it is not given."
        },
    )
    act_group_size: int | None = field(
        default=None,
        metadata={
            "help": "How many consecutive inputs share a scale of the rounded activations; None: all of a token."
        },
    )
    act_bits_pattern: dict[str, int | None] | None = field(
        default=None,
        metadata={
            "help": "Other `act_bits` by module: patterns of names as in LoRA's `rank_pattern` -> 8, 4, or None (16), "
            "floats. {'down_proj': 8} beside act_bits=4 keeps the input with most outliers at 8 bits."
        },
    )
    act_rule: Literal["transformers", "vllm"] = field(
        default="transformers",
        metadata={
            "help": "Whose arithmetic rounds activations: transformers' (127.5 or 7.5 steps for the largest "
            "magnitude, as compressed-tensors computes it) or that of vLLM's kernels (127 or 7)."
        },
    )
    kv_bits: int | None = field(
        default=None,
        metadata={
            "help": "8 or 4: keys and values are rounded to so many bits per token and head where they are written to "
            "the cache, in training and wherever the merged model runs (docs/guides/activations.md)."
        },
    )
    kv_rule: Literal["transformers", "vllm"] = field(
        default="transformers",
        metadata={
            "help": "How: as transformers does it with the `kv_cache_scheme` of the merged checkpoint, which vLLM "
            "refuses; or as vLLM does it with `--kv-cache-dtype int8_per_token_head` (or int4_...)."
        },
    )
    act_scale: Literal["dynamic", "static"] = field(
        default="dynamic",
        metadata={
            "help": "Scales of rounded activations: found anew for every token, or 'static': one for each layer, set "
            "by `calibrate_activations(model, batches)` before training, learned (LSQ), and stored (W8A8 only)."
        },
    )

    base_fingerprint: str | None = field(
        default=None,
        metadata={
            "help": "Set by the conversion and saved with the adapter: a checksum of the float weights it was made "
            "for. An adapter is loaded on that base only."
        },
    )
    base_checksum: str | None = field(
        default=None,
        metadata={
            "help": "Set by the conversion and saved with the adapter: a checksum of the integers that the base "
            "converted to. An adapter is loaded over those integers only."
        },
    )

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
        vars(self).update(hidden)
        super().__post_init__()
        vars(self).update(own)
        self.peft_type = ensure_peft_type("LRQAT")

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    def adopt_defaults(self) -> None:
        """Give what was left open its value on a float base."""
        self.adopt(**{**_GRID_DEFAULTS, **({"group_size": PER_CHANNEL} if self.rounds_inputs else {})})
        wide = isinstance(self.bits, (int, float)) and self.bits > 7  # what else it may be is refused later
        self.adopt(downcast="int" if wide else "fx8", signed_scales=bool(self.symmetric))

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
        return (
            f"LR-QAT ([arXiv 2406.06385](https://arxiv.org/abs/2406.06385)): rank {self.r}, "
            f"lora_alpha {self.lora_alpha} ({self.adapter_unit}), base kept as {self.downcast}, {ranges}"
            + (f", {self.describe_activations()}" if self.rounds_inputs else "")
            + (f", {self.kv_bits}-bit KV cache as {self.kv_rule} has it" if self.kv_bits is not None else "")
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

    def rank_of(self, name: str) -> int:
        """The rank in the layer of that name."""
        pattern: dict[str, int] = self.rank_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), name), self.r)

    def expected_shapes(self, name: str, out_features: int, in_features: int, experts: int = 1) -> dict[str, tuple]:
        rank = self.rank_of(name) * experts
        shapes: dict[str, tuple] = {"lora_A.weight": (rank, in_features), "lora_B.weight": (out_features, rank)}
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
        iterations = _loftq_iterations(self.loftq_config)
        if self.init_lora_weights == "loftq" and iterations != 1:
            raise ValueError(
                f"`loftq_config` asks for loftq_iter={iterations}; only 1 is supported (as in the paper): with more, "
                "the frozen codes would depend on the SVD and could not be recomputed when the adapter is loaded."
            )
        for name, reason in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"LR-QAT does not support `{name}`: {reason}.")
        self._set_strength()

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
        self.lora_alpha = _STRENGTH * divisor(self.r)
        by_rank = {key: _STRENGTH * divisor(rank) for key, rank in ranks.items() if key not in self._given_alpha}
        self.alpha_pattern = {**self._given_alpha, **by_rank}
        self._default_alpha = self.lora_alpha, dict(self.alpha_pattern)


def _loftq_iterations(loftq_config: Any) -> int:
    if isinstance(loftq_config, dict):
        return loftq_config.get("loftq_iter", 1)
    return getattr(loftq_config, "loftq_iter", 1)
