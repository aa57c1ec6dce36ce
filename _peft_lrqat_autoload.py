"""Registers LR-QAT as soon as PEFT is imported; what the `.pth` file of `peft_lrqat.autoload` imports at start-up.

A module of its own, outside the package, because importing anything inside `peft_lrqat` imports torch: this one runs in
*every* start of the environment's Python, so it imports nothing and only puts a finder in front of `sys.meta_path`.

The finder wraps the loader of the module `peft`. It stays in place until that module has been executed, not only found:
transformers looks for PEFT with `importlib.util.find_spec("peft")` long before anything imports it.
"""

import sys


class _Finder:
    """Finds `peft` as the other finders do, and puts `_Loader` around its loader."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader:
    """Another loader, and `import peft_lrqat` after it has executed its module."""

    def __init__(self, loader, finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # from here on the module looks as if nobody had stood in between
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        try:
            import peft_lrqat  # noqa: F401
        except Exception as error:
            import warnings

            # a broken plugin must not take PEFT with it
            warnings.warn(
                f"peft_lrqat's autoload could not import peft_lrqat ({type(error).__name__}: {error}), so PEFT does "
                "not know LR-QAT in this process. `python -m peft_lrqat.autoload disable` turns the autoload off.",
                stacklevel=2,
            )


def install():
    """Arm the hook, once; nothing to do where PEFT is imported already."""
    if "peft" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
