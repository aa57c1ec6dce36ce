"""Walks through a model's modules, several of which a Trainer makes in every step, while the GPU waits.

An adapted layer is nine modules, most of them deep in the model. torch's generators hand each module from level to
level, which takes as long as a layer's launches.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .frozen import FrozenWeight


class QuickWalks(nn.Module):
    """A module that yields all below it itself, and counts its parameters in one walk."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield what torch's `named_modules` does, in its order.

        Args:
            memo: modules that are left out, with all below them. Those that are yielded join them, unless
                `remove_duplicate` is False.
            prefix: comes before every name.
        """
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        levels = [(prefix, iter(self._modules.items()))]
        while levels:
            above, children = levels[-1]
            for key, child in children:
                if child is None or child in memo:
                    continue
                name = f"{above}.{key}" if above else key
                if type(child).named_modules is not nn.Module.named_modules:
                    yield from child.named_modules(memo, name, remove_duplicate)
                    continue
                if remove_duplicate:
                    memo.add(child)
                yield name, child
                if child._modules:
                    levels.append((name, iter(child._modules.items())))
                    break
            else:
                levels.pop()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters as transformers' models do; of a packed base, its weights.

        A Trainer asks in every step, for the number of operations.

        Args:
            only_trainable: those that require gradients.
            exclude_embeddings: without the weights of nn.Embedding, which a tied output layer shares.
        """
        counts: dict[int, int] = {}
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or (only_trainable and not parameter.requires_grad):
                    continue
                if exclude_embeddings and name == "weight" and isinstance(module, nn.Embedding):
                    counts[id(parameter)] = 0
                elif id(parameter) not in counts:
                    counts[id(parameter)] = _weights(module, name, parameter)
        return sum(counts.values())


def _weights(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    if name == "base" and isinstance(module, FrozenWeight):
        return module.out_features * module.in_features
    return parameter.numel()
