"""`LowBitSRConfig`: which weights become trainable integers, and on which grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...grid import PER_CHANNEL, PER_TENSOR, TERNARY, Grid
from ...packing import unpack, words_per_row
from ...ranges import LOW_BIT_RANGE_METHODS
from ...registration import ensure_peft_type
from ..common.adapter_file import CODES, FACTOR, SCALE, STREAM
from ..common.config import ALL_LINEAR, GridConfig
from ..common.rules import FLAG, INTEGER, SHARED, Rule, is_positive, one_of, optional

#: The grids that can be trained.
BITS = (TERNARY, 2, 3, 4, 8)
EXPORT_FORMATS = ("compressed-tensors", "bitnet")


@dataclass
class LowBitSRConfig(GridConfig, PeftConfig):
    """Configuration of low-bit training with stochastic rounding (DQT, arXiv 2412.04787).

    Raises:
        ValueError: a field is out of range, or options contradict each other.
    """

    method = "Low-bit SR"
    quantizes = (nn.Linear, Conv1D)
    contents: ClassVar[dict[str, Any]] = {
        "lowbitsr_codes": CODES,
        "lowbitsr_scale": SCALE,
        "lowbitsr_stream": STREAM,
        "lowbitsr_scale_shift": FACTOR,
        "lowbitsr_act_scale": FACTOR,
    }
    rules: ClassVar[dict[str, Rule]] = {
        **SHARED,
        "bits": Rule(
            f"allowed are {', '.join(map(str, BITS))} (1.58 is ternary)",
            lambda value: not isinstance(value, bool) and value in BITS,
        ),
        "forward_bits": one_of(None, TERNARY),
        "range_method": optional(one_of(*LOW_BIT_RANGE_METHODS)),
        "headroom": Rule("it must be a number of at least 1", lambda value: is_positive(value) and value >= 1),
        "signed_scales": optional(FLAG),
        "grow_scales": optional(FLAG),
        "bias": one_of("none", "all", "lowbitsr_only"),
        "export_format": optional(one_of(*EXPORT_FORMATS)),
        "seed": INTEGER,
        **dict.fromkeys(("error_feedback", "keep_base", "init_weights"), FLAG),
    }

    target_modules: list[str] | str | None = field(
        default=ALL_LINEAR,
        metadata={
            "help": "Names or a regular expression of the layers to train. 'all-linear': all linear layers but the "
            "output layer; what is left out stays float."
        },
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names or regex to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained in float and saved with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings that are trained in float."}
    )
    bias: Literal["none", "all", "lowbitsr_only"] = field(
        default="none", metadata={"help": "Which biases are trained, in float: none, all, or those of these layers."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: an adapter starts at the rounded base. False: random moves of a step (tests)."},
    )
    bits: int = field(default=8, metadata={"help": "1.58 (ternary: -1, 0, 1), 2, 3, 4 or 8."})
    group_size: int = field(
        default=PER_CHANNEL,
        metadata={
            "help": "What shares a scale: this many consecutive input features (a divisor of in_features), -1 for an "
            "output channel, 0 for the whole tensor (DQT as published, BitNet)."
        },
    )
    range_method: Literal["absmean", "minmax", "lp"] | None = field(
        default=None,
        metadata={
            "help": "Initial scale: 'absmean' (DQT, BitNet), 'minmax', 'lp'. None: absmean for ternary, minmax at 8 "
            "bits, lp between; see docs/concepts/low-bit-sr.md."
        },
    )
    range_p: float = field(default=2.5, metadata={"help": "Exponent of the error norm of range_method='lp'."})
    headroom: float = field(
        default=1.0,
        metadata={
            "help": "A factor on the initial scales, which makes the grid as much coarser. Fixed scales bound how far "
            "weights can grow: from scratch 4 bits may take 1.5, and 8 bits without `grow_scales` 2 to 4; for "
            "fine-tuning leave it at 1."
        },
    )
    signed_scales: bool = field(  # type: ignore[assignment]  # None exists only until __post_init__
        default=None,
        metadata={
            "help": "Whether the sign of a scale chooses the side of zero on which the grid has its extra level (-8 to "
            "7, or -7 to 8). None: yes, but for ternary grids and 'absmean'."
        },
    )
    grow_scales: bool = field(  # type: ignore[assignment]  # None exists only until __post_init__
        default=None,
        metadata={
            "help": "Double a scale during training, and halve its codes, where more than a 128th of these come to lie "
            "at the ends of the grid: 8 bits only. None: yes for 8 bits and 'minmax'."
        },
    )
    learn_scales: bool = field(default=False, metadata={"help": "Train the scales, as relative changes in fp32."})
    error_feedback: bool = field(
        default=False,
        metadata={
            "help": "Put the rounding remainder into the momentum (ECO, arXiv 2601.22101). Needs LowBitAdamW, which "
            "takes it as its default."
        },
    )
    forward_bits: Any = field(
        default=None,
        metadata={"help": "1.58: the forward, and the checkpoint, use the ternary projection of the trained codes."},
    )
    act_bits: int | None = field(
        default=None,
        metadata={
            "help": "8 or 4: the input of every layer is rounded to that many bits per token, straight-through; as in "
            "LRQATConfig, or as BitNet does (8)."
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
    keep_base: bool = field(
        default=True,
        metadata={
            "help": "Keep the rounded base beside the adapters' codes. False halves the memory of the weights; then "
            "there is one adapter, which cannot be disabled or unloaded."
        },
    )
    scale_dtype: Literal["auto", "bf16", "fp16", "fp32"] = field(
        default="auto", metadata={"help": "What the checkpoint will store for a scale; as in LRQATConfig."}
    )
    container_bits: int | None = field(
        default=None,
        metadata={"help": "Width of the codes in the merged checkpoint: the grid's (ternary: 2), or wider, up to 8."},
    )
    export_format: Literal["compressed-tensors", "bitnet"] | None = field(
        default=None,
        metadata={
            "help": "Format of the merged checkpoint. None: 'bitnet' for per-tensor ternary weights with act_bits=8, "
            "else 'compressed-tensors'. It decides how activations are rounded, so in training too."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the random numbers that round, one stream for each weight."})
    base_fingerprint: str | None = field(
        default=None,
        metadata={
            "help": "Set by the conversion and saved with the adapter: a checksum of the float weights it was made "
            "for. An adapter is loaded on that base only."
        },
    )
    base_checksum: str | None = field(
        default=None,
        metadata={"help": "Set by the conversion and saved with the adapter: a checksum of the base's integers."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type("LOWBITSR")
        self.check_options()
        if self.range_method is None:
            self.range_method = "absmean" if self.grid.ternary else "minmax" if self.bits == 8 else "lp"
        if self.grow_scales is None:
            self.grow_scales = self.bits == 8 and self.range_method == "minmax"
        if self.signed_scales is None:
            self.signed_scales = not self.is_older_adapter() and self.has_sides
        self.require_base()

    @property
    def target_parameters(self) -> None:
        """PEFT reads it; only modules can be adapted."""
        return None

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size)

    @property
    def stored_grid(self) -> Grid:
        return Grid(self.forward_bits or self.bits, self.group_size)

    @property
    def kept_as(self) -> str:
        return "int"

    @property
    def bytes_per_weight(self) -> float:
        return 2 * self.grid.code_bits / 8  # the base, and the adapter that starts as its copy

    def check_values(self, widths: dict[str, int]) -> None:
        if not self.grid.ternary or self._adapter_path is None:
            return
        with safe_open(self._adapter_path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dictionary
                layer = name.removeprefix("base_model.model.").removesuffix(".lowbitsr_codes")
                if name.endswith(".lowbitsr_codes") and layer in widths:
                    self.check_codes(layer, file.get_tensor(name), widths[layer])

    def check_codes(self, layer: str, packed: torch.Tensor, in_features: int) -> None:
        """Raise ValueError if a layer's packed codes, int32 (out, words), hold -2, which the ternary grid has not."""
        if self.grid.ternary and int(unpack(packed, 2, in_features).min()) < self.grid.qmin:
            raise ValueError(
                f"The adapter file holds two-bit codes for module {layer!r}, but this model's grid is ternary: the "
                "adapter was made for another grid. Load it with the configuration that it was trained with."
            )

    def experts_problem(self) -> str:
        return "LowBitSRConfig trains layers one by one, but experts are one layer; LRQATConfig trains them"

    def expected_shapes(self, name: str, out_features: int, in_features: int, experts: int = 1) -> dict[str, tuple]:
        scales = self.grid.scale_shape(out_features, in_features)
        shapes: dict[str, tuple] = {
            "lowbitsr_codes": (out_features, words_per_row(in_features, self.grid.code_bits)),
            "lowbitsr_scale": scales,
        }
        if self.learn_scales:
            shapes["lowbitsr_scale_shift.weight"] = scales
        if self.learns_input_scale(name):
            shapes["lowbitsr_act_scale.weight"] = (1,)
        return shapes

    def recipe(self) -> str:
        ranges = f"ranges by {self.range_method}{' with signed scales' if self.signed_scales else ''}"
        ranges += f", with {self.headroom:g} times the scale" if self.headroom != 1 else ""
        extras = [f"{self.bits}-bit codes, {'from a quantized base' if self.wants_quantized_base else ranges}"]
        if self.error_feedback:
            extras.append("error feedback")
        if self.learn_scales:
            extras.append("learned scales")
        if self.rounds_inputs:
            extras.append(self.describe_activations())
        if self.kv_bits is not None:
            extras.append(f"{self.kv_bits}-bit KV cache as {self.kv_rule} has it")
        return (
            "direct low-bit training with stochastic rounding ([DQT, arXiv 2412.04787]"
            f"(https://arxiv.org/abs/2412.04787)): {', '.join(extras)}"
        )

    # -- checks

    def check_options(self) -> None:
        """Raise ValueError if an option is out of range, or options contradict each other."""
        self.check_fields()
        self._check_grid()
        self.check_signed_scales()
        self.check_container()
        self._check_export()

    def _check_grid(self) -> None:
        if self.bits != TERNARY:
            self.bits = int(self.bits)  # 4.0 is 4
        Grid(self.bits, self.group_size)
        if self.grow_scales and self.bits != 8:
            raise ValueError(
                f"`grow_scales` is True, but `bits` is {self.bits}: halved codes of a grid as coarse would lose what "
                "they were trained to. Leave it out, and give the scales `headroom`, or `learn_scales=True`."
            )
        if self.forward_bits is not None and self.grid.code_bits < 3:
            raise ValueError(
                f"`forward_bits` is 1.58, but `bits` is {self.bits}: there is nothing to project. Train at least 3 "
                "bits, or leave `forward_bits` out."
            )

    def _check_export(self) -> None:
        options = (self.act_group_size, self.act_bits_pattern or {}, self.act_rule, self.act_scale)
        plain = options == (None, {}, "transformers", "dynamic")
        bitnet = self.stored_grid.ternary and self.group_size == PER_TENSOR and self.act_bits == 8 and plain
        if self.export_format is None:
            self.export_format = "bitnet" if bitnet and self.container_bits is None else "compressed-tensors"
        if self.export_format == "bitnet":
            if not bitnet:
                raise ValueError(
                    "`export_format` is 'bitnet', which holds ternary weights with one scale per tensor and int8 "
                    "activations only: `bits=1.58` (or `forward_bits=1.58`), `group_size=0`, `act_bits=8` without "
                    "`act_group_size`, `act_bits_pattern`, `act_rule` and `act_scale`. Use 'compressed-tensors'."
                )
            if self.container_bits not in (None, 2):
                raise ValueError(
                    f"`container_bits` is {self.container_bits}, but BitNet's format stores 2 bits a code. Use "
                    "`export_format='compressed-tensors'` for wider containers."
                )
        self.check_activations()
        self.check_cache()
