"""What is served: the checkpoints, the computing dtypes and the prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """One checkpoint: a grid and the width of the codes in its file."""

    name: str
    bits: int
    group_size: int
    symmetric: bool = True
    container_bits: int = 4
    dtypes: tuple[str, ...] = ("float16",)  # what the engine computes in

    @property
    def grid(self) -> str:
        share = "per channel" if self.group_size < 0 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {share}, {'symmetric' if self.symmetric else 'asymmetric'}"


# vLLM's CPU kernel reads 4-bit containers only; narrower grids fit into them exactly. Every checkpoint is stored once,
# in bf16. Its scales are exact in fp16 too, whose finer logits leave fewer ties between tokens than those of bf16.
SPECS = (
    Spec("w4-g64", 4, 64, dtypes=("float16", "bfloat16")),
    Spec("w4-channel", 4, -1),
    Spec("w3-g64-in-4", 3, 64),
    Spec("w2-g64-in-4", 2, 64),
    Spec("w4-g64-asym", 4, 64, symmetric=False),
    Spec("w2-g64-asym-in-4", 2, 64, symmetric=False),
)

NEW_TOKENS = 40

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
