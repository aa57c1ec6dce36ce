"""`LowBitSRConfig`: which weights become trainable integers, and on which grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftConfig
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...arguments import with_suggestions
from ...grid import PER_CHANNEL, PER_TENSOR, TERNARY, Grid
from ...packing import unpack, words_per_row
from ...ranges import LOW_BIT_RANGE_METHODS
from ...registration import ensure_peft_type
from ..common.absent import OF_OTHERS
from ..common.adapter_file import CODES, FACTOR, SCALE, STREAM
from ..common.config import ALL_LINEAR, GridConfig
from ..common.field_help import with_help
from ..common.rules import FLAG, INTEGER, SHARED, Rule, is_positive, one_of, optional

_FACTORS = "Low-bit SR trains the weights themselves, not low-rank factors beside them"

# Options of LoraConfig and LRQATConfig that it does not have.
_ABSENT: dict[str, str] = {
    **OF_OTHERS,
    **dict.fromkeys(LoraConfig.__dataclass_fields__, f"{_FACTORS}, and this is an option of those. Leave it out."),
    **dict.fromkeys(
        ("r", "rank", "lora_rank", "lora_r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        f"{_FACTORS}, so it has no rank and no alpha. Leave it out, or use LRQATConfig, which has them.",
    ),
    **dict.fromkeys(("lora_dropout", "dropout"), f"{_FACTORS}, whose input could be dropped. Leave it out."),
    "init_lora_weights": "Did you mean `init_weights`?",
    "target_parameters": "It trains layers one by one, and experts of mixtures stay float; LRQATConfig trains them.",
    "fan_in_fan_out": "A layer says by itself how its weight lies. Leave it out.",
    "ensure_weight_tying": (
        "What it trains in float is not tied to other weights. Leave it out, or use LRQATConfig, which can tie it."
    ),
    "runtime_config": "Layers are converted where they are: move the model to the GPU before `get_peft_model`.",
    "symmetric": "Its grids are all symmetric. Leave it out, or use LRQATConfig, which has zero points too.",
    "downcast": "The base is kept as integers of `bits`. Leave it out; `keep_base=False` drops it altogether.",
    "offload_base": "The trained integers stay on the GPU. Leave it out; `keep_base=False` halves their memory.",
}

#: The grids that can be trained.
BITS = (TERNARY, 2, 3, 4, 8)
EXPORT_FORMATS = ("compressed-tensors", "bitnet")


@with_help
@with_suggestions
@dataclass
class LowBitSRConfig(GridConfig, PeftConfig):
    """Configuration of low-bit SR: direct training of integers with stochastic rounding (DQT, arXiv 2412.04787).

    Every converted weight *is* a packed integer code, in training too. An optimizer's step is rounded to the grid at
    random, so that it is right on average. `LowBitAdamW` takes the least memory; other optimizers work as well. A base
    that is quantized already must be symmetric, with the `bits` and `group_size` of this configuration.
    `config.for_loading()` quantizes a model while it is loaded.

    Attributes:
        bits (int | float): Width of the trained codes: 1.58 (ternary: -1, 0, 1), 2, 3, 4 or 8. Default: `8`.
        group_size (int): How many consecutive input features share a scale. It divides `in_features` of every converted
            layer. -1: a scale for every output channel. 0: one scale for the tensor (DQT as published, BitNet).
            Default: `-1`.
        forward_bits (float | None): 1.58: forward and checkpoint use the ternary projection of the trained codes
            ("ternary inference" of DQT). It needs `bits` of 3 or more. Default: `None`, the codes themselves.
        signed_scales (bool | None): Whether a scale may be negative, and so choose the side of zero on which the grid
            has its extra level (4 bits: -8 to 7, or -7 to 8). Default: `True`; False for ternary grids and "absmean".
        scale_dtype (str): What the checkpoint stores for a scale. Training sees exactly that number. "auto": numbers
            that are exact in both bf16 and fp16, for any engine. "bf16", "fp16", "fp32": numbers that are exact in that
            type. Default: `"auto"`.
        container_bits (int | None): Width of the codes in the merged checkpoint, from that of the grid (ternary: 2) to
            8. Default: `None`, that of the grid; with rounded inputs it becomes 8 where a scale serves a channel or the
            tensor, and the grid has 5 bits or more or `act_scale` is "static".
        range_method (str | None): Where the first scales come from. "absmean": the mean magnitude lies on the highest
            level (DQT, BitNet). "minmax": every weight is covered. "lp": the least sum of rounding errors to the power
            of `range_p`. Default: `"minmax"` at 8 bits; "absmean" for ternary; "lp" between.
        range_p (float): Exponent of `range_method="lp"`, above 0. Multiples of 0.5 are fast. Default: `2.5`.
        headroom (float): A factor on the first scales, 1 or more, that leaves weights room to grow and makes the grid
            as much coarser. From scratch take 3 at 4 bits, 2 at 3 bits and 1.5 at 2 bits together with
            `LowBitAdamW(latent_weights=True)`, and 2 to 4 at 8 bits without `grow_scales`. For fine-tuning leave it
            at 1. Default: `1.0`.
        grow_scales (bool | None): Double a scale during training, and halve its codes, where more than a 128th of these
            lie at the ends of the grid. It is for 8 bits only. Default: `True`; False below 8 bits, and where
            `range_method` is not "minmax".
        learn_scales (bool): Train the scales, as relative changes in fp32. Default: `False`.
        error_feedback (bool | None): Put what a rounding lost into the momentum (ECO, arXiv 2601.22101), at no cost in
            memory. True: training needs `LowBitAdamW`, and other optimizers are refused. False: never. Default: `None`,
            with `LowBitAdamW`, and not with others.
        keep_base (bool): Keep the rounded base beside the trained codes. False halves the memory of the weights; then
            there is one adapter, which cannot be disabled or unloaded. Default: `True`.
        seed (int): Seed of the random numbers that round. Every weight has a stream of its own. Default: `0`.
        init_weights (bool): True: training starts at the rounded base. False: at random moves of a step, for tests.
            Default: `True`.
        export_format (str | None): Format of the merged checkpoint, "compressed-tensors" or "bitnet". It decides how
            inputs are rounded, in training too. Default: `"compressed-tensors"`; "bitnet" for ternary weights with
            `group_size=0` and `act_bits=8`.
        target_modules (str | list[str] | None): Names, or a regular expression, of the layers to convert: `nn.Linear`
            and GPT-2's `Conv1D`. "all-linear": all linear layers, but not the output layer. What is not named stays
            float, and so do experts of mixtures. Default: `"all-linear"`.
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
        bias (str): Which biases are trained, in float. "none"; "all"; "lowbitsr_only": those of the converted layers.
            Default: `"none"`.
        act_bits, act_bits_pattern, act_group_size, act_rule, act_scale, kv_bits, kv_rule: Rounded inputs, and a rounded
            KV cache. `GridConfig` describes them.
        task_type (TaskType | str | None): PEFT's, such as "CAUSAL_LM". It chooses the class of the PEFT model.
            "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" train the head in float. Default: `None`.
        inference_mode (bool): Whether an adapter is loaded frozen. Default: `False`.
        base_dtype, base_head, base_fingerprint, base_checksum, trainings: What an adapter notes of its base and its
            past. `GridConfig` describes them.

    PEFT sets `peft_type`, `auto_mapping`, `peft_version`, `base_model_name_or_path` and `revision`.

    Raises:
        ValueError: a field is out of range, or contradicts another one. The message names the field, its value and what
            is allowed.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LowBitAdamW, LowBitSRConfig
        >>> from transformers import AutoModelForCausalLM
        >>> config = LowBitSRConfig(bits=8, keep_base=False, task_type="CAUSAL_LM")
        >>> config.range_method
        'minmax'
        >>> model = get_peft_model(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B"), config)
        >>> trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        >>> optimizer = LowBitAdamW(trained, lr=3e-5)
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
    meaning = ("forward_bits", "export_format", *GridConfig.meaning)
    absent: ClassVar[dict[str, str]] = _ABSENT
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
        "error_feedback": optional(FLAG),
        "bias": one_of("none", "all", "lowbitsr_only"),
        "export_format": optional(one_of(*EXPORT_FORMATS)),
        "seed": INTEGER,
        **dict.fromkeys(("keep_base", "init_weights"), FLAG),
    }

    target_modules: list[str] | str | None = ALL_LINEAR
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Literal["none", "all", "lowbitsr_only"] = "none"
    init_weights: bool = True
    bits: int = 8
    group_size: int = PER_CHANNEL
    range_method: Literal["absmean", "minmax", "lp"] | None = None
    range_p: float = 2.5
    headroom: float = 1.0
    signed_scales: bool = None  # type: ignore[assignment]  # None exists only until __post_init__
    grow_scales: bool = None  # type: ignore[assignment]  # None exists only until __post_init__
    learn_scales: bool = False
    error_feedback: bool | None = None
    forward_bits: Any = None
    act_bits: int | None = None
    act_group_size: int | None = None
    act_bits_pattern: dict[str, int | None] | None = None
    act_rule: Literal["transformers", "vllm"] = "transformers"
    kv_bits: int | None = None
    kv_rule: Literal["transformers", "vllm"] = "transformers"
    act_scale: Literal["dynamic", "static"] = "dynamic"
    keep_base: bool = True
    scale_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    container_bits: int | None = None
    export_format: Literal["compressed-tensors", "bitnet"] | None = None
    seed: int = 0
    base_dtype: str | None = None
    base_head: dict[str, Any] | None = None
    base_fingerprint: str | None = None
    base_checksum: str | None = None
    trainings: list[dict[str, str]] | None = None

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
    def keeps_places(self) -> bool:
        return self.grid.ternary and not self.inference_mode  # the grid that has latent weights without being asked

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
        """Raise ValueError if a layer's packed codes, int32 (out, words), hold -2, which the ternary grid does not
        have.
        """
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
            "lowbitsr_stream": (2,),
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
        if self.trained_beside:
            extras.append(f"trained in float beside: {', '.join(self.trained_beside)}")
        return f"direct low-bit training with stochastic rounding (DQT, arXiv 2412.04787): {', '.join(extras)}"

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
                "they were trained to. Leave it out, and give the scales `headroom`."
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
