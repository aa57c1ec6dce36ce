"""`LowBitAdamW`: packed codes in, packed codes out.

Any torch optimizer trains low-bit weights (`any_optimizer.py`), at the price of a dense gradient, dense fp32 state and
a transient fp32 copy. This one keeps 8-bit or factored state, works on row chunks, can feed the rounding remainder back
into the momentum, and with `fused_backward=True` updates each weight as soon as its gradient is there and frees the
gradient, so that no two dense gradients exist at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from transformers import TrainingArguments

from ...arguments import check_flags, nearest, with_suggestions
from ...grid import TERNARY
from ...ops.latent import new_latent
from ...ops.low_bit_step import Scalars, step_codes
from ...ops.narrow_gradient import NarrowGradient
from ...ops.reference_step import DIRECTION, MOMENTUM, SECOND_MOMENT, Rule, momentum_of_linear_codes, new_state
from .growth import grow
from .in_backward import Released, UpdateInBackward, gradients_are_complete, refuse_several_processes, take_over
from .optimizer_options import check_options, has_latent_weights, of_rule, warn_of_latent_weights
from .remainder import last_positive, scale_remainder
from .tensor import LowBitTensor
from .trainer_arguments import end_clipping, options_of

# torch decorates it in a way that hides its signature
torch_adamw: Any = adamw


@with_suggestions
class LowBitAdamW(Optimizer):
    """AdamW (arXiv 1711.05101) whose step on low-bit weights ends in one stochastic rounding.

    Packed codes go in, and packed codes come out: no weight has a dense copy, and the state is compact. What else is
    trained (scales, norms, biases, `modules_to_save`) takes torch's own AdamW step with fp32 state. The rule of the
    step is in `ops/reference_step.py`.

    Memory in bytes a low-bit weight. Its codes take `bits` / 8, and as much again with the configuration's
    `keep_base=True`.

        state                           "8bit"  2;  "factored"  1;  "fp32"  8
        state with betas=(0, ...)       "8bit"  1;  "factored"  0.01;  "fp32"  4
        latent weights (ternary)        1 more
        gradients                       4, of all weights until `step()`
        gradients, fused_backward=True  4 (of a bf16 or fp16 model 2), of one layer at a time; in CUDA graphs
                                        (`CudaGraphCallback`) of one block

    So 8-bit weights take 8 bytes with all defaults (codes 1, base 1, state 2, gradient 4), 4 with
    `fused_backward=True`, and 3 with `keep_base=False` as well.

    Args:
        params (Iterable): parameters that require gradients, or dictionaries of parameter groups, as torch's optimizers
            take them. Low-bit weights among them are found by their type.
        lr (float | torch.Tensor): learning rate, 0 or more, in the unit of `lr_unit`. A 0-dim tensor on the device
            keeps the host out of the step.
        betas (tuple[float, float]): decay of the first and the second moment, each in [0, 1). `error_feedback` needs
            the first above 0.
        eps (float): added to the root of the second moment, in units of the gradient.
        weight_decay (float): decoupled: a step takes `lr * weight_decay` of every weight, with either `lr_unit`.
        state (str): how the moments of low-bit weights are kept: "8bit", "factored" (the second as means of rows and
            columns, as in Adafactor) or "fp32".
        error_feedback (bool | None): put what a rounding lost into the momentum (ECO, arXiv 2601.22101). None: as the
            configuration of each weight says; if that does not say either, yes, where there is a momentum.
        lr_unit (str): "weight": weight units, as everywhere. "grid": grid steps, so that coarse and fine grids change
            as many codes in a step; scales do not grow then (`grow_scales`).
        latent_weights (bool | None): keep an int8 behind each code: where between, and beyond, the levels the weight
            belongs, in 64ths of a step. Codes are then rounded to nearest, as those of a straight-through estimator are
            from float masters, and scales of ternary weights follow the latent weights' mean magnitude (with
            `lr_unit="weight"`). None: for ternary weights, and not for others. True: for those of 2, 3 and 4 bits too;
            not for 8-bit codes, which are as fine. With `state="factored"` it takes what "8bit" takes without it.
        fused_backward (bool): update a low-bit weight when its gradient arrives in backward, and free the gradient.
        gradient_accumulation_steps (int | None): with `fused_backward`: after how many backward passes to update, 1 or
            more. Until the last of them the gradients are kept. None: when accelerate says that gradients are complete,
            as Trainer has it say; without accelerate, after each pass.
        compile (bool): `torch.compile` the update where Triton's kernel for it does not run, except for an 8-bit state
            of more than 256 inputs that are no multiple of 256, which torch 2.13 gets wrong.

    Raises:
        ValueError: an argument is out of range or contradicts another one; `fused_backward` with more than one
            data-parallel process.
        RuntimeError: with `fused_backward`, in backward or in what follows: something asks for a gradient that was used
            and freed. That is clipping by the norm (Trainer: set `max_grad_norm=0`), a gradient scaler, or a second
            backward before `step()`. The message says which.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_lrqat import LowBitAdamW, LowBitSRConfig
        >>> model = get_peft_model(base, LowBitSRConfig(bits=8, keep_base=False))
        >>> trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        >>> optimizer = LowBitAdamW(trained, lr=3e-5, fused_backward=True)
        >>> batch = tokenizer(texts[0][:64], return_tensors="pt")
        >>> model(**batch, labels=batch["input_ids"]).loss.backward()  # low-bit weights are updated here
        >>> optimizer.step()  # and everything else here
        >>> optimizer.zero_grad()

        A Trainer takes it as `optimizer_cls_and_kwargs=LowBitAdamW.for_trainer(args)`.
    """

    handles_low_bit = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        state: str = "8bit",
        error_feedback: bool | None = None,
        lr_unit: str = "weight",
        latent_weights: bool | None = None,
        fused_backward: bool = False,
        gradient_accumulation_steps: int | None = None,
        compile: bool = False,
    ) -> None:
        if gradient_accumulation_steps is not None and (
            not isinstance(gradient_accumulation_steps, int) or gradient_accumulation_steps < 1
        ):
            raise ValueError(
                f"`gradient_accumulation_steps` is {gradient_accumulation_steps!r}; it must be 1 or more, or None."
            )
        check_flags(fused_backward=fused_backward, compile=compile)
        if not isinstance(params, Iterable):
            raise ValueError(
                f"`params` is a {type(params).__name__}; give the parameters that are to be trained: "
                "`[p for p in model.parameters() if p.requires_grad]`."
            )
        if (gradient_accumulation_steps or 1) > 1 and not fused_backward:
            raise ValueError(
                f"`gradient_accumulation_steps` is {gradient_accumulation_steps}, which matters with "
                "`fused_backward=True` only: otherwise call step() as often as you like."
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        compact = {"state": state, "error_feedback": error_feedback, "lr_unit": lr_unit}
        every = {**defaults, **compact, "latent_weights": latent_weights}
        check_options(every)
        super().__init__(params, every)
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self._compile = compile
        self.fused_backward = fused_backward
        self._forget()
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, LowBitTensor):
                    self._rule(parameter, group)  # an early error
        if fused_backward:
            refuse_several_processes()
            self._register()

    @classmethod
    def for_trainer(cls, args: TrainingArguments, **options: Any) -> tuple[type[LowBitAdamW], dict[str, Any]]:
        """Make what a Trainer takes as `optimizer_cls_and_kwargs`, for the least memory.

        A Trainer passes nothing of its arguments to an optimizer that it is given so, not even the learning rate.

        Args:
            args (TrainingArguments): the arguments of the same Trainer. `learning_rate` and `adam_epsilon` are taken
                from them, and `adam_beta1` and `adam_beta2` if one is not their default (0.9, 0.999).
                `max_grad_norm` is set to 0 in them if it is the default of 1 and `fused_backward` is on. Weight decay
                and the schedule the Trainer sets itself.
            **options (Any): options of `LowBitAdamW`, in place of those. `fused_backward` is on where there is one
                process, and none of torchrun's, whose DistributedDataParallel needs the gradients.

        Returns:
            (LowBitAdamW, its options).

        Raises:
            TypeError: `LowBitAdamW` has no such option.
            ValueError: an option is out of range; `args` are no arguments of a Trainer; or they ask for clipping (a
                `max_grad_norm` that is neither 0 nor the default), and `fused_backward` is on.

        Examples:
            >>> from peft_lrqat import LowBitAdamW, LowBitSRConfig
            >>> from trl import SFTConfig, SFTTrainer
            >>> args = SFTConfig("adapter", learning_rate=3e-5, max_steps=10)
            >>> trainer = SFTTrainer(
            ...     "Qwen/Qwen3-0.6B",
            ...     args,
            ...     train_dataset=dataset,
            ...     peft_config=LowBitSRConfig(bits=8, keep_base=False, task_type="CAUSAL_LM"),
            ...     optimizer_cls_and_kwargs=LowBitAdamW.for_trainer(args),
            ... )
        """
        found = options_of(args, options)
        cls([torch.zeros(0)], **found)  # which says what is wrong with them
        end_clipping(args, found)
        return cls, found

    def _forget(self) -> None:
        """Begin with nothing that is known of steps."""
        self._arrived: dict[torch.Tensor, int] = {}
        self._rules: dict[torch.Tensor, tuple[tuple, Rule]] = {}
        self._scalars = Scalars()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch does; `__init__` adds the first ones.

        Args:
            param_group (dict): `params`, and options of their own: any of `lr`, `betas`, `eps`, `weight_decay`,
                `state`, `error_feedback`, `lr_unit` and `latent_weights`.

        Raises:
            ValueError: an option is out of range.
        """
        for name in param_group.keys() - self.defaults.keys():
            if near := nearest(name, self.defaults):
                warnings.warn(
                    f"A parameter group has `{name}`, which LowBitAdamW does not read. Did you mean `{near}`?",
                    stacklevel=3,
                )
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            take_over(parameter)

    # -- the step

    @torch.compiler.disable  # as any optimizer's (`any_optimizer.py`); `compile` compiles the update
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # torch overloads it
        """Update everything that has a gradient, and was not updated in backward.

        Args:
            closure (Callable[[], float] | None): computes the loss, with gradients, before the update.

        Returns:
            What `closure` returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            plain = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not isinstance(parameter, LowBitTensor):
                    plain.append(parameter)
                elif isinstance(parameter.grad, Released):
                    parameter.grad = None
                else:
                    self._step_codes(parameter, parameter.grad, group)
            self._step_floats(plain, group)
        self._arrived.clear()
        if self.fused_backward:
            self._register()  # moving a model to another device leaves the hooks behind
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as torch does. Backward passes before it do not count for accumulation.

        Args:
            set_to_none (bool): whether they become None, or zeros.
        """
        super().zero_grad(set_to_none)
        self._arrived.clear()

    def _register(self) -> None:
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if not isinstance(parameter, LowBitTensor) or not parameter.requires_grad:
                    continue  # an adapter that is not active; once it is, its first gradient waits for `step()`
                hooks: Any = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
                alive = any(isinstance(hook, UpdateInBackward) and hook.optimizer() for hook in hooks.values())
                if not alive:
                    parameter.register_post_accumulate_grad_hook(UpdateInBackward(self, index))
                parameter.taken_at_once = True

    def arrive(self, parameter: Any, group: dict[str, Any]) -> bool:
        """Update a weight whose gradient is complete, and free the gradient; False: it is not complete yet."""
        refuse_several_processes()
        if self.gradient_accumulation_steps is None:
            complete = gradients_are_complete()
        else:
            self._arrived[parameter] = self._arrived.get(parameter, 0) + 1
            complete = self._arrived[parameter] >= self.gradient_accumulation_steps
        if complete:
            grad = parameter.grad
            parameter.grad = None
            grad = grad.held if isinstance(grad, NarrowGradient) else grad
            norms: Any = self._step_codes(parameter, grad, group, norms=True)
            parameter.grad = Released(parameter, norms)
        return complete

    def _rule(self, parameter: LowBitTensor, group: dict[str, Any]) -> Rule:
        """The rule of a weight's step, made anew where an option has changed."""
        options = (parameter.error_feedback, *group["betas"], *of_rule(group))
        known = self._rules.get(parameter)
        if known is None or known[0] != options:
            known = self._rules[parameter] = options, self._new_rule(parameter, group)
        return known[1]

    def _new_rule(self, parameter: LowBitTensor, group: dict[str, Any]) -> Rule:
        feedback = group["error_feedback"]
        feedback = parameter.error_feedback if feedback is None else feedback
        beta1, beta2 = group["betas"]
        feedback = beta1 > 0 if feedback is None else feedback
        if feedback and not beta1:
            raise ValueError(
                f"`betas` is {group['betas']}, but `error_feedback` keeps the rounding remainder in the momentum. Use "
                "betas[0] > 0, or error_feedback=False."
            )
        if group["latent_weights"] and parameter.grid.bits == 8:
            raise ValueError(
                "`latent_weights` is True, but there are low-bit weights of 8 bits, which are as fine themselves. Use "
                "it for coarser grids, or for parameter groups without 8-bit weights; None means ternary weights only."
            )
        made = self.state.get(parameter, {})
        kind = next((kind for kind, name in SECOND_MOMENT.items() if name in made), group["state"])
        if kind != group["state"]:
            raise ValueError(
                f"`state` of a parameter group is {group['state']!r}, but its weights have been trained with {kind!r}. "
                "Go on with that, or make another LowBitAdamW."
            )
        return Rule(
            parameter.grid,
            parameter.shape[1],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            feedback,
            group["lr_unit"],
            group["state"],
            has_latent_weights(parameter, group),
            self._compile,
        )

    def _step_codes(
        self, parameter: LowBitTensor, grad: torch.Tensor, group: dict[str, Any], norms: bool = False
    ) -> torch.Tensor | None:
        """Take a step; `norms` and what is returned are those of `step_codes`."""
        rule = self._rule(parameter, group)
        state, device = self.state[parameter], parameter.device
        if not state:
            state.update(new_state(parameter.shape, rule.state, rule.momentum, device))
        if parameter.places is not None:  # the first step
            if rule.latent_weights and "latent_codes" not in state:
                weight = parameter.packed, parameter.stream, rule.columns
                state["latent_codes"] = new_latent(*weight, parameter.places)
            parameter.forget_places()
        lr = group["lr"]
        last_lr = state.pop("last_lr", None)
        if rule.error_feedback:
            scale_remainder(state, lr, last_lr)
        lr = self._scalars.rate(lr, device)
        corrections = self._scalars.corrections(rule, float(state["step"]) + 1, device)
        codes = (parameter.packed, parameter.scale, parameter.stream)
        found = step_codes(*codes, grad, state, lr, rule, corrections, norms)
        if rule.lr_unit == "weight":  # a rate in grid steps would double with the scale
            grow(parameter)
        if rule.error_feedback and (last_lr := last_positive(group["lr"], last_lr)) is not None:
            state["last_lr"] = last_lr
        return found

    def _step_floats(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                }
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        if parameters:
            torch_adamw(
                parameters,
                [grad.to(torch.float32) for grad in (parameter.grad for parameter in parameters) if grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                foreach=parameters[0].is_cuda,
                capturable=parameters[0].is_cuda,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    # -- saving

    def __getstate__(self) -> dict[str, Any]:
        ours = ("gradient_accumulation_steps", "_compile", "fused_backward")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "fused_backward" in state:  # a copy, or from a pickle; `load_state_dict` brings groups and moments
            self._forget()
            if self.fused_backward:
                self._register()
        for group in self.param_groups:  # of earlier files
            group.setdefault("latent_weights", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, which casts all state to the parameter's dtype. The state's codes become integers again.

        An 8-bit momentum in the linear code of earlier files is put on today's code. The options are the file's, as
        with torch's optimizers: weights that were trained without latent weights, or with them, go on as they were,
        which is warned of where this optimizer would have it otherwise.

        Raises:
            ValueError: another optimizer saved the state of low-bit weights.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):  # torch counts them
            if "state" not in saved and any(isinstance(parameter, LowBitTensor) for parameter in group["params"]):
                raise ValueError(
                    "The state was saved by another optimizer, as its options say: LowBitAdamW cannot go on with it. "
                    "Resume with that optimizer, or load the model without the optimizer's state (Trainer: delete "
                    "optimizer.pt from the checkpoint)."
                )
        asked = self._latent_weights()
        super().load_state_dict(state_dict)  # leaves `step` where it was saved
        warn_of_latent_weights(asked, self._latent_weights())
        for parameter, state in self.state.items():
            if isinstance(parameter, LowBitTensor):
                # name -> a tensor of the dtype that was saved; of both momenta, because either may be there
                kinds = {"latent_codes": torch.empty(0, dtype=torch.int8)}
                for momentum in (MOMENTUM, DIRECTION):
                    kinds |= new_state(torch.Size((1, 1)), "8bit", momentum, torch.device("cpu"))
                for name, value in state.items():
                    device = torch.device("cpu") if name == "step" else parameter.device
                    state[name] = value.to(device, kinds[name].dtype) if name in kinds else value
                if "exp_avg_sq_rows" in state:  # which earlier files have without their mean
                    state["exp_avg_sq_mean"] = state["exp_avg_sq_rows"].mean()
                if (step := state.pop("exp_avg_step", None)) is not None:
                    linear = state["exp_avg_codes"], step.to(parameter.device, torch.float32)
                    state["exp_avg_codes"], state["exp_avg_unit"] = momentum_of_linear_codes(*linear)

    def _latent_weights(self) -> list[tuple[bool, bool | None]]:
        """Tell of each low-bit weight whether it has latent weights, and the option that says so."""
        weights = ((p, g) for g in self.param_groups for p in g["params"] if isinstance(p, LowBitTensor))
        return [(has_latent_weights(parameter, group), group["latent_weights"]) for parameter, group in weights]

    def __repr__(self) -> str:
        kinds = {p.grid.bits for g in self.param_groups for p in g["params"] if isinstance(p, LowBitTensor)}
        names = ", ".join("ternary" if bits == TERNARY else f"{bits} bits" for bits in sorted(kinds))
        return f"{super().__repr__()}\nlow-bit weights: {names or 'none'}"
