"""A model as the teacher: loaded beside the student, checked against it, and asked for logits."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..checkpoint.load import replace_layer
from ..grid import PER_CHANNEL, Grid, GridTensor, quantize
from ..modules.packed import merged_layer
from ..ranges import choose_range
from ..tuners.common.loss import causal_lm_loss

KEEP = ("int8", "cpu")
# What the student is called with that does not go to the teacher
_NOT_FOR_TEACHERS = {
    "labels",
    "shift_labels",
    "num_items_in_batch",
    "use_cache",
    "return_dict",
    "output_router_logits",
    "output_attentions",
    "output_hidden_states",
}


def check_teacher(teacher: Any) -> None:
    """Raise ValueError for what is neither a model nor a name or folder."""
    is_model = isinstance(teacher, nn.Module) and hasattr(teacher, "config")
    if not (is_model or isinstance(teacher, (str, os.PathLike))) or teacher == "":
        found = f"a {type(teacher).__name__}" if isinstance(teacher, nn.Module) else repr(teacher)
        raise ValueError(
            f"`teacher` is {found}; it must be a model of transformers, its name or folder, or a folder that "
            "`store_logits` wrote."
        )


def check_keep(keep: str | None, teacher: Any) -> None:
    """Raise ValueError if there is no such way to keep a teacher, or not for this one."""
    if keep is not None and keep not in KEEP:
        raise ValueError(f"`keep` is {keep!r}; it must be None, 'int8' or 'cpu'.")
    if keep is not None and isinstance(teacher, nn.Module):
        raise ValueError(f"`keep={keep!r}` is for a teacher that is given by name. Give the name, or leave it out.")


def load_teacher(name: str | os.PathLike, student: Any, keep: str | None) -> nn.Module:
    """The model of that name or folder, on the student's device and in its dtype.

    Args:
        keep: None: as it is. "int8": its linear layers, except the output layer, rounded to 8 bits. "cpu": its weights
            stay in the memory of the CPU, and each layer's travel to the student's device when it is called.

    Raises:
        ValueError: there is no such model, `keep` does not suit it, or DeepSpeed ZeRO-3 would shard it.
    """
    import transformers
    from accelerate import cpu_offload
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"The teacher {str(name)!r} would be sharded by DeepSpeed ZeRO-3 as it is loaded. Store its logits "
            "(`store_logits`) and give the folder to `Distillation`."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
        with _whole_on_each_rank():
            teacher: nn.Module = kind.from_pretrained(name, dtype=student.dtype)
    except OSError as error:
        raise ValueError(
            f"The teacher {str(name)!r} is no folder of stored logits (`store_logits` writes one), and it could not be "
            f"loaded as a model: {error}"
        ) from error
    teacher.requires_grad_(False).eval()
    device = student.device
    if keep == "int8":
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"The teacher {str(name)!r} is quantized already. Leave `keep` out.")
        keep_in_8_bits(teacher, device)
    if keep == "cpu":
        return cpu_offload(teacher, device) if device.type != "cpu" else teacher
    return teacher.to(device)


@contextmanager
def _whole_on_each_rank() -> Iterator[None]:
    """Under FSDP, transformers leaves the weights of other ranks than 0 empty: sharding, which no teacher undergoes,
    would fill them."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    if before is not None:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


@torch.no_grad()
def keep_in_8_bits(model: Any, device: torch.device) -> None:
    """Round the linear layers to 8 bits, in place: groups of 128 inputs, or a scale for each output channel.

    The output layer stays, as do embeddings and experts that are one tensor. One layer's floats at a time are on
    `device`, where the rounded ones remain.
    """
    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or layer is head:
            continue
        weight = layer.weight.to(device)
        grid = Grid(bits=8, group_size=128 if layer.in_features % 128 == 0 else PER_CHANNEL)
        scale, zero_point = choose_range(weight, grid, "minmax")
        codes = GridTensor(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)
        replace_layer(model, name, merged_layer(codes, layer.bias, 8, weight.dtype))


class ModelTeacher:
    """A model that is asked for its logits."""

    def __init__(self, model: Any, student: Any) -> None:
        """
        Args:
            model: it is put in eval mode; `release` restores the mode that it was in.
            student: the causal language model that is trained.

        Raises:
            ValueError: it is the student, shares trained weights with it, or has another vocabulary.
        """
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        if model is student or any(id(p) in trained for p in model.parameters()):
            raise ValueError(
                "The teacher is the model that is trained: adapters change it in place, so it would follow its student."
                " Give the name of the float model, or make `copy.deepcopy(model)` before the adapter."
            )
        own, other = (_vocabulary(one) for one in (student, model))
        if None not in (own, other) and own != other:
            raise ValueError(
                f"The teacher has {other} tokens in its vocabulary, the student {own}; the probabilities of one mean "
                "nothing to the other. Choose a teacher with the student's tokenizer, and pad embeddings alike."
            )
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            warnings.warn(
                f"The teacher ({type(model).__name__}) is quantized itself. The float model teaches better; "
                "`keep='int8'` holds it in 8 bits.",
                stacklevel=2,
            )
        self.model = model
        self._was_training = model.training
        model.eval()

    def release(self) -> None:
        """Put the model back in the mode that it was in."""
        self.model.train(self._was_training)

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Any], shift_labels: torch.Tensor) -> torch.Tensor:
        """Logits (batch, tokens, V), on the teacher's device.

        Args:
            inputs: what the student's forward is called with.
            shift_labels: not looked at.

        Raises:
            ValueError: the student is called with embeddings in place of token ids.
        """
        if inputs.get("input_ids") is None:
            raise ValueError(
                "The student is called without `input_ids`, so the teacher cannot read what it reads. Prompt learning "
                "and `inputs_embeds` do not go with distillation."
            )
        given = {name: value for name, value in inputs.items() if name not in _NOT_FOR_TEACHERS}
        if not hasattr(self.model, "_hf_hook"):  # of accelerate, which moves inputs itself
            device = next(self.model.parameters()).device
            given = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        return self.model(**given, use_cache=False).logits


def named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `model`, by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _vocabulary(model: Any) -> int | None:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "vocab_size", None)


def causal_lm(model: Any) -> Any:
    """The causal language model in what a Trainer trains, if its loss is one that can be replaced."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftMixedModel, PeftModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PeftModel | PeftMixedModel):
        model = model.get_base_model()
    two_parts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # labels of another sequence
    if two_parts or getattr(model, "loss_function", None) not in (ForCausalLMLoss, causal_lm_loss):
        raise ValueError(
            f"The loss of {type(model).__name__} is not the one of causal language models in transformers, so "
            "`Distillation` would replace something else. Compute `peft_lrqat.distillation_loss` in a Trainer's "
            "`compute_loss`."
        )
    return model
