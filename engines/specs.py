"""What is served: the checkpoints, the computing dtypes and the prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """One checkpoint: a grid and the width of the codes in its file."""

    name: str
    bits: float
    group_size: int
    symmetric: bool = True
    container_bits: int = 4
    stored: str = "bfloat16"  # dtype of the scales and of what is not quantized
    dtypes: tuple[str, ...] = ("float16",)  # what the engines compute in
    act_bits: int | None = None
    act_rule: str = "transformers"
    signed_scales: bool = False
    experts: int = 0  # of every layer, of which a token takes one; 0: the dense model

    @property
    def grid(self) -> str:
        share = "per channel" if self.group_size < 0 else f"groups of {self.group_size}"
        return f"{self.bits:g} bits, {share}, {'symmetric' if self.symmetric else 'asymmetric'}"


# vLLM's CPU kernel reads 4-bit containers only; narrower grids fit into them exactly. Training is in bf16; the scales
# are exact in fp16 too, whose finer logits leave fewer ties between tokens. Asymmetric checkpoints are stored in the
# dtype they are computed in: transformers 5.23 decompresses them in the stored one first, and would round twice.
SPECS = (
    Spec("w4-g64", 4, 64, dtypes=("float16", "bfloat16")),
    Spec("w4-channel", 4, -1),
    Spec("w3-g64-in-4", 3, 64),
    Spec("w4-g64-asym", 4, 64, symmetric=False, stored="float16"),
    Spec("w2-g64-asym-in-4", 2, 64, symmetric=False, stored="float16"),
)

# For matrix.py only; "ternary" is a low-bit SR model, its first rounding with a
# few steps on top: it says nothing, but says it in every engine alike.
EXPORTED = (
    Spec("w4-g64-signed", 4, 64, signed_scales=True),
    Spec("w4-channel-a8-signed", 4, -1, container_bits=8, act_bits=8, signed_scales=True),
    Spec("w4-channel-a8", 4, -1, container_bits=8, act_bits=8),
    Spec("w4-channel-a8-vllm", 4, -1, container_bits=8, act_bits=8, act_rule="vllm"),
    Spec("w4-g64-a8", 4, 64, act_bits=8),
    Spec("w2-g64", 2, 64, container_bits=2),
    Spec("ternary", 1.58, 0, container_bits=2, act_bits=8),
)

# For llama_cpp.py only: Mixtrals whose experts start as the dense model's MLP.
MIXTURES = (Spec("moe-w4-g64", 4, 64, experts=2),)

NEW_TOKENS = 32

COMPLETIONS = (
    "The capital of France is",
    "In Python, a context manager is",
    "def fibonacci(n):",
    "Water boils at",
)
CHATS = (
    "Name three primary colours.",
    "What does a compiler do? Answer in two sentences.",
)
