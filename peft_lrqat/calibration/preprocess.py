"""`preprocess_gptq`: quantize a float model with GPTQ, on calibration text, for LR-QAT to start from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..arguments import check_flags, with_suggestions
from ..checkpoint.load import replace_layer
from ..formats.record import Record
from ..grid import join_rows
from ..modules.experts import ExpertStack
from ..modules.packed import describe, merged_layer
from ..tuners.common.experts import settle_experts
from ..tuners.common.rules import POSITIVE, check_value
from .calibrate import AnyConfig, BlockInputs, check_config, collect_hessians, decoder_blocks, read_batches, some
from .gptq import gptq_round
from .offloaded import arrive, bring_in, by_block


@with_suggestions
@torch.no_grad()
def preprocess_gptq(
    model: nn.Module | str | os.PathLike,
    config: AnyConfig,
    calibration: Iterable[Mapping[str, torch.Tensor] | torch.Tensor | str],
    tokenizer: Any = None,
    *,
    length: int = 1024,
    damping: float = 0.01,
    progressbar: bool = True,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Quantize the layers that `config` targets with GPTQ (arXiv 2210.17323), in place, as a start for LR-QAT.

    Afterwards the model is an ordinary quantized one. `save_pretrained` writes it, and `get_peft_model(model, config)`
    starts from its integers and scales. (PEFT's `preprocess_corda` is called in the same way.)

    A model that is too large in float is given by its name or folder. One decoder block of it is loaded at a time, on
    the accelerator if there is one, with the same result. A model that was loaded with its blocks offloaded is treated
    alike.

    The experts of a mixture are each rounded for the tokens that the router sends them. One that fewer tokens reach
    than it has inputs takes, for each that is missing, the mean token of all experts of its layer; a warning names it.

    Memory above the float model: the hidden states of the calibration tokens and, for one block at a time, an fp32 (in,
    in) matrix for each distinct input of a layer, and for each expert. Of a model that is loaded here, only one block
    is float, and what lies outside the blocks.

    Args:
        model (nn.Module | str | os.PathLike): a float causal language model of transformers, or what `from_pretrained`
            takes.
        config (LRQATConfig | LowBitSRConfig): its grid (`bits`, `group_size`, `symmetric`), scales (`range_method`,
            `range_p`, `scale_dtype`, `signed_scales`) and target modules are used.
        calibration (Iterable): texts; or token ids, int64 (batch, length); or what the model takes (`input_ids`,
            `attention_mask`), for instance from a DataLoader. 64 to 256 windows of 1024 tokens are usual.
        tokenizer (Any): for texts. They are joined by its end-of-text token and cut into windows of `length` tokens.
        length (int): tokens a window, for texts only.
        damping (float): what is added to the diagonal of a Hessian, as a share of its mean; above 0.
        progressbar (bool): show the blocks go by.
        model_init_kwargs (Mapping | None): for a model that is loaded here, the options of `from_pretrained` (`dtype`,
            `revision`, `trust_remote_code` ...). `device_map` may name one device.

    Returns:
        The model; `model` itself if it was one.

    Raises:
        ValueError: `config` is of another method; there is no calibration text, or less than one window; or the
            targeted layers are not those of decoder blocks: nothing was changed then. Or no token reached a layer, its
            Hessian could not be factored, or a weight of a block that came in was not finite: blocks before it are
            quantized by then, so load the model again.
        FileNotFoundError: `model` is neither a folder nor the name of a repository.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LRQATConfig, preprocess_gptq
        >>> config = LRQATConfig(bits=4, group_size=128, task_type="CAUSAL_LM")
        >>> quantized = preprocess_gptq("Qwen/Qwen3-0.6B", config, texts, tokenizer, length=256)
        >>> quantized.save_pretrained("base-w4")  # adapters belong to this base
        >>> model = get_peft_model(quantized, config)
    """
    check_config(config)
    check_flags(progressbar=progressbar)
    check_value("damping", damping, POSITIVE)
    with by_block(model, config, "GPTQ", model_init_kwargs) as model:
        name, blocks, layers = decoder_blocks(model, config, "GPTQ")
        bring_in(model, without=blocks)
        batches = list(read_batches(model, calibration, tokenizer, length))
        was_training = model.training
        model.eval()
        inputs = BlockInputs(model, blocks, batches)
        short: list[str] = []
        described = tqdm(list(enumerate(blocks)), desc="GPTQ", disable=not progressbar)
        for index, block in described:
            # taken out, so that nothing keeps the float weights of a block that is done
            own = {key: layers.pop(key) for key in list(layers) if key.startswith(f"{name}.{index}.")}
            own = arrive(model, block, own, config)
            try:
                hessians, few = collect_hessians(inputs, index, block, own)
                if missed := sorted(own.keys() - hessians.keys()):
                    raise ValueError(
                        f"No calibration token reached layer {missed[0]!r}, or the model reads its weight without "
                        "calling it (Jamba's `dt_proj`). Leave it out with `exclude_modules`, or give more text."
                    )
                quantized = {k: _quantized(layer, hessians.pop(k), config, damping) for k, layer in own.items()}
                del own
                for key in list(quantized):
                    replace_layer(model, key, quantized.pop(key))
            finally:
                settle_experts(block)
            if few:
                short.append(f"{len(few)} in block {index} ({some(few)})")
            inputs.advance(index, block)
        if short:
            warnings.warn(
                f"Fewer calibration tokens than an expert has inputs reached {'; '.join(short[:8])}"
                f"{' ...' * (len(short) > 8)}. For each token that is missing they took the mean token of all experts "
                "of their layer; more text reaches more of them.",
                stacklevel=2,
            )
        model.train(was_training)
        if getattr(model, "config", None) is not None:
            describe(model, Record(config.grid, config.scale_dtype, "GPTQ (arXiv 2210.17323)"))
    return model


def _quantized(layer: nn.Linear, hessian: torch.Tensor, config: AnyConfig, damping: float) -> nn.Module:
    experts = layer.experts if isinstance(layer, ExpertStack) else 1
    weights = [
        gptq_round(
            weight,
            own,
            config.grid,
            range_method=config.range_method or "lp",
            range_p=config.range_p,
            scale_dtype=config.scale_dtype,
            signed_scales=config.signed_scales,
            damping=damping,
        )
        for weight, own in zip(layer.weight.chunk(experts), hessian.view(experts, *hessian.shape[-2:]), strict=True)
    ]
    bits = config.container_bits or config.grid.code_bits
    weight = weights[0] if experts == 1 else join_rows(weights)
    return merged_layer(weight, layer.bias, bits, layer.weight.dtype, experts=experts)
