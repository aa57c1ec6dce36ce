"""What users and accelerate have hung on a layer, which its replacement takes over."""

from __future__ import annotations

from torch import nn

# The dictionaries of nn.Module's hooks around forward and backward. They are shared, not copied, so that the handles
# which users hold still remove them.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have the hooks of `old`, accelerate's among them, called by `new`; its training mode is taken over too."""
    for name in _HOOKS:
        vars(new)[name] = vars(old)[name]
    new.training = old.training
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
