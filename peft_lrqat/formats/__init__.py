"""How a layer lies in a file: one module for each format, which reads and writes it. No nn.Module, no whole model.

`reading.py` is the only reader. Writers are named here and imported when they are asked for, so that what one needs
beyond the core (`gguf`, `torchao`) is needed by its users only.
"""

from __future__ import annotations

import importlib
import importlib.util

from ..installing import how_to_install
from .writer import Writer

#: Format -> "module:class", relative to this package.
FORMATS = {
    "compressed-tensors": ".compressed_tensors:CompressedTensorsWriter",
    "gptq": ".gptq:GPTQWriter",
    "bitnet": ".bitnet:BitNetWriter",
    "torchao": ".torchao:TorchAOWriter",
    "gguf": ".gguf.writer:GGUFWriter",
}


def writer_of(format: str) -> Writer:
    """The writer of a format.

    Raises:
        ValueError: there is no such format.
        ImportError: it needs a package that is not installed; the message names the extra.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"`format` is {format!r}; the formats are {', '.join(FORMATS)}.")
    module, _, name = FORMATS[format].partition(":")
    found: type[Writer] = getattr(importlib.import_module(module, __package__), name)
    for package in found.needs:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"`format={format!r}` needs the package {package!r}: {how_to_install(package)}.")
    return found()
