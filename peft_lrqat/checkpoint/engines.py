"""Which engines load a checkpoint, and why others do not.

The rules are what was run, or read in the engine's source where no hardware was at hand. docs/reference/engines.md has
the table, docs/results/engines.md the commands.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from ..formats import compressed_tensors
from ..formats.compressed_tensors import multiplies_int8
from ..formats.source import LayerInfo
from ..ops.kv_cache import CacheRounding

# With AVX2 it loads them and fails with the first request.
_AVX512 = "where the CPU has AVX-512"
# Both read in vLLM 0.32: `CompressedTensorsW8A8Int8` has one number for all layers of a fused one, into which each is
# copied as it is read; `_apply_weights_sgl` hands no scale to its kernel.
_VLLM_FIXED = (
    "layers that it fuses (q, k and v) get the fixed scale of the one that it reads last; `calibrate_activations` "
    "gives them one"
)
_AMX_FIXED = "on a CPU with AMX it takes a scale for each token instead"
_VLLM_STEPS = "its largest activation has 127 steps, not the 127.5 of training (`act_rule='vllm'` trains 127)"


@dataclass(frozen=True)
class Engine:
    """An engine, and whether it loads a checkpoint.

    Attributes:
        name: with the packages it needs.
        loads: whether it does.
        why: the reason why not, or what to know.
        run: False where this was read in the engine's source, not run.
    """

    name: str
    loads: bool
    why: str = ""
    run: bool = True


def engines(
    format: str,
    infos: Collection[LayerInfo],
    bits: int,
    file_group: int,
    config: Any = None,
    problem: str = "",
    cache: CacheRounding | None = None,
    experts: Collection[str] = (),
) -> list[Engine]:
    """The engines for a format, with their verdict on these layers.

    Args:
        bits: width of the stored codes.
        file_group: inputs that share a stored scale; -1: all.
        config: the model's configuration, if it is at hand.
        problem: why transformers cannot load them from compressed-tensors, or nothing.
        cache: how keys and values are rounded; None: they are not.
        experts: what the file calls the parts of an expert ("gate_proj"), if experts are among the layers.
    """
    found = _by_layers(format, infos, bits, file_group, problem)
    found = [_with_experts(one, experts) for one in found] if experts else found
    if cache is not None:
        found = [_with_cache(one, format, cache) for one in found]
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not architecture or _in_vllm(config, architecture):
        return found
    why = f"it has no model for {architecture}"
    return [Engine(one.name, False, why, run=False) if "vLLM" in one.name else one for one in found]


def _with_cache(engine: Engine, format: str, cache: CacheRounding) -> Engine:
    """What an engine does with a rounded KV cache."""
    if not engine.loads:
        return engine
    if "vLLM" not in engine.name:
        if "transformers" in engine.name and (format, cache.rule) == (compressed_tensors.NAME, "transformers"):
            return engine
        why = f"keeps the KV cache in floats; it was trained with {cache.describe()}"
        return replace(engine, why="; ".join(filter(None, (engine.why, why))))
    if cache.rule != "vllm":
        return replace(engine, loads=False, why="it knows no KV cache of integers in config.json", run=False)
    if "CPU" in engine.name:
        return replace(engine, loads=False, why="on a CPU it has no KV cache of integers", run=False)
    return replace(engine, why=f"with --kv-cache-dtype int{cache.bits}_per_token_head", run=False)


def _with_experts(engine: Engine, parts: Collection[str]) -> Engine:
    if engine.name == "transformers + compressed-tensors":
        return engine
    if engine.name == "gptqmodel":
        others = sorted(set(parts) - _GPTQMODEL)
        why = f"it looks for gate_proj, up_proj and down_proj of experts, not for {others[0]}" if others else ""
        return replace(engine, loads=not others, why=why)
    if "transformers" in engine.name:
        return Engine(engine.name, False, JOINS_EXPERTS)
    if engine.name == "vLLM on a CPU" and engine.loads:
        return replace(engine, loads=False, why=_AMX)
    return replace(engine, run=False)  # of mixtures


#: Why transformers loads no experts from any format but compressed-tensors.
JOINS_EXPERTS = "transformers joins the experts of a file into one tensor, and has no integers there"

# What gptqmodel 7.7 calls the parts of experts, in files of every architecture.
_GPTQMODEL = {"gate_proj", "up_proj", "down_proj"}

# Refused when it was run; on which CPUs it is not, was read in vLLM 0.32's source.
_AMX = (
    "its kernel for experts wants a CPU with AMX and a symmetric grid of 4 bits (in compressed-tensors, in groups of "
    "another size than 32), and rounds activations to 8 bits"
)


def _in_vllm(config: Any, architecture: str) -> bool:
    """Whether vLLM has a model of a class, by the list in its source: it generates text, or pools it. Of
    models with an encoder and a decoder it has only Whisper."""
    if getattr(config, "is_encoder_decoder", False):
        return architecture.startswith("Whisper")
    is_text = hasattr(config.get_text_config(), "vocab_size")
    return is_text and not architecture.endswith(("ForMaskedLM", "ForQuestionAnswering", "ForMultipleChoice"))


def _by_layers(format: str, infos: Collection[LayerInfo], bits: int, file_group: int, problem: str) -> list[Engine]:
    if format == "compressed-tensors":
        return _compressed_tensors(infos, bits, file_group, problem)
    if format == "gptq":
        return _gptq(bits, file_group)
    if format == "torchao":
        return [
            Engine("transformers + torchao", True),
            Engine(
                "vLLM on a CPU + torchao", bits in (2, 3, 4, 8), "" if bits in (2, 3, 4, 8) else f"{bits} bits: not run"
            ),
        ]
    if format == "awq":
        return [
            Engine("transformers + gptqmodel", True, run=False),
            Engine("vLLM on a GPU", True, run=False),
            Engine("others", False, "write it as compressed-tensors or gptq"),
        ]
    if format == "bitnet":
        return [
            Engine("transformers", True),
            Engine("vLLM", False, "it does not list the format; use compressed-tensors", run=False),
        ]
    return []


def _compressed_tensors(infos: Collection[LayerInfo], bits: int, file_group: int, problem: str) -> list[Engine]:
    dense = bits in (3, 5, 6, 7)
    needs = "compressed-tensors 0.18 or later, which packs these widths densely" if dense else ""
    rounded = [info for info in infos if info.activations is not None]
    plain = [info for info in infos if info.activations is None]
    if not all(map(_rounds_as_transformers, rounded)):
        needs = "it rounds activations otherwise than they were trained (`act_rule='vllm'`)" + (needs and f"; {needs}")
    verdicts = [_with_rounded_inputs(rounded)] if rounded else []
    verdicts += [_with_float_inputs(plain, file_group)] if plain or not rounded else []
    vllm = [_both(*pair) for pair in zip(*verdicts, strict=True)]
    return [Engine("transformers + compressed-tensors", not problem, problem or needs), *vllm]


def _rounds_as_transformers(info: LayerInfo) -> bool:
    return info.activations is not None and info.activations.rule == compressed_tensors.NAME


def _both(one: Engine, *others: Engine) -> Engine:
    """The verdict on a checkpoint that has layers of several kinds: what stands in the way of any, or what to know."""
    found = [one, *others]
    loads = all(each.loads for each in found)
    reasons = dict.fromkeys(each.why for each in found if each.why and each.loads == loads)
    return Engine(one.name, loads, "; ".join(reasons), run=all(each.run for each in found))


def _with_float_inputs(infos: list[LayerInfo], file_group: int) -> list[Engine]:
    widths = sorted({info.container_bits for info in infos})
    odd = [info for info in infos if info.kind == "linear" and (info.in_features % 32 or info.out_features % 32)]
    why = ""
    if wrong := [bits for bits in widths if bits != 4]:
        why = f"no kernel for {wrong[0]}-bit weights with float activations"
        why += "; write them with container_bits=4" if wrong[0] < 4 else ""
    elif odd:
        why = f"a layer is {odd[0].out_features} x {odd[0].in_features}; both must divide by 32"
    elif file_group > 0 and file_group % 2:
        why = f"groups of {file_group}; an even number is needed"
    others = [bits for bits in widths if bits not in (4, 8)]
    gpu = f"{others[0]}-bit weights need an optional kernel package, or container_bits=4" if others else ""
    return [Engine("vLLM on a CPU", not why, why or _AVX512), Engine("vLLM on a GPU", not gpu, gpu, run=False)]


def _with_rounded_inputs(rounded: list[LayerInfo]) -> list[Engine]:
    fixed = any(info.activations.static for info in rounded if info.activations)
    steps = _VLLM_STEPS if any(map(_rounds_as_transformers, rounded)) and not fixed else ""
    if all(multiplies_int8(info.grid, info.container_bits, info.activations) for info in rounded):
        why = _VLLM_FIXED if fixed else steps
        cpu = f"{why}; {_AMX_FIXED}" if fixed else why
        return [Engine("vLLM on a CPU", True, cpu), Engine("vLLM on a GPU", True, why, run=False)]
    why = "it leaves the activations of packed weights float; write them with container_bits=8, per channel"
    gpu = "with the package humming-kernels, and --linear-backend humming: other kernels leave activations float"
    gpu = "; ".join(filter(None, (gpu, steps)))
    return [Engine("vLLM on a CPU", False, why), Engine("vLLM on a GPU", True, gpu, run=False)]


def _gptq(bits: int, file_group: int) -> list[Engine]:
    cpu = "" if bits == 4 else f"no kernel for {bits} bits; the CPU kernel takes 4"
    gpu = "" if bits in (4, 8) else f"no kernel for {bits} bits"
    genai = "" if bits in (2, 4, 8) else f"no operator for {bits} bits"
    genai = genai or ("" if 16 <= file_group <= 256 else "its blocks have 16 to 256 inputs")
    return [
        Engine("gptqmodel", True),
        Engine("transformers + optimum + gptqmodel", True),
        Engine("vLLM on a CPU", not cpu, cpu or _AVX512),
        Engine("vLLM on a GPU", not gpu, gpu, run=False),
        Engine(
            "onnxruntime-genai, by its model builder",
            not genai,
            genai or "with /lm_head/MatMul and /model/embed_tokens/Gather in nodes_to_exclude",
        ),
    ]
