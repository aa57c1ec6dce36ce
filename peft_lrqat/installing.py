"""How to install what is missing, in the words of every message that says so."""

from __future__ import annotations

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

    This package is on no index yet, so what works in a checkout comes first.
    """
    extras = ",".join(dict.fromkeys(EXTRAS[name] for name in packages if name in EXTRAS))
    others = " ".join(name for name in packages if name not in EXTRAS)
    ways = [f"`pip install {others}`"] if others else []
    if extras:
        ways.append(f'`pip install ".[{extras}]"` in a checkout of peft-lrqat')
        ways[-1] += f' (`pip install "peft-lrqat[{extras}]"` from an index)'
    return " and ".join(ways)
