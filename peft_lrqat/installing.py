"""How to install what is missing, in the words of every message that says so."""

from __future__ import annotations

from ._version import __version__

#: Whether the package is on the Python package index. The first release sets it.
ON_INDEX = False

#: Import name of a package that is not always there -> the extra of this one that installs it.
EXTRAS = {
    "compressed_tensors": "checkpoint",
    "gguf": "gguf",
    "matplotlib": "plot",
    "torchao": "torchao",
    "trl": "train",
}


def how_to_install(*packages: str) -> str:
    """What to type for packages, by their import names; those of no extra are installed by themselves.

    Of this package, what works today comes first: a checkout, until it is on an index.
    """
    extras = ",".join(dict.fromkeys(EXTRAS[name] for name in packages if name in EXTRAS))
    others = " ".join(name for name in packages if name not in EXTRAS)
    ways = [f"`pip install {others}`"] if others else []
    if extras:
        here = f'`pip install ".[{extras}]"` in a checkout of peft-lrqat'
        index = f'`pip install "peft-lrqat[{extras}]"`'
        ways.append(f"{index} ({here})" if ON_INDEX else f"{here} ({index} from an index)")
    return " and ".join(ways)


def where_from() -> str:
    """What a model card says behind `import peft_lrqat`: nothing that does not work for whoever reads it."""
    return "pip install peft-lrqat" if ON_INDEX else f"the package peft-lrqat {__version__}"


def named() -> str:
    """This package in Markdown, with a link if it leads anywhere."""
    name = "[peft-lrqat](https://pypi.org/project/peft-lrqat/)" if ON_INDEX else "peft-lrqat"
    return f"{name} {__version__}"
