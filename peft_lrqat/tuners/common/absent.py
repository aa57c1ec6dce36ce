"""Options that users bring from LoRA, from the other method or from other quantizers, and a configuration does not
have: what is said to them.

A sentence follows "... got an unexpected keyword argument `option`." (`arguments.with_suggestions`). The nearest name
would mislead: `load_in_4bit` is like `container_bits`, and `rank_pattern` like `layers_pattern`.
"""

from __future__ import annotations

_QUANTIZES = (
    "`get_peft_model` quantizes the model itself, to `bits`. Load the model in float, without a BitsAndBytesConfig; "
    "`from_pretrained(..., quantization_config=config.for_loading())` quantizes it while it is loaded."
)

#: What is said of options of neither method.
OF_OTHERS: dict[str, str] = {
    **dict.fromkeys(
        ("num_bits", "n_bits", "nbits", "w_bits", "wbits", "weight_bits", "nbits_w", "quant_bits"),
        "Did you mean `bits`?",
    ),
    **dict.fromkeys(("activation_bits", "a_bits", "input_bits"), "Did you mean `act_bits`?"),
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_config", "quantize", "quant_method", "quant_type"), _QUANTIZES
    ),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
        _QUANTIZES,
    ),
    **dict.fromkeys(
        ("dtype", "torch_dtype", "compute_dtype"),
        "Layers compute in the dtype of the model that they are in: load it in the one that you want.",
    ),
}
