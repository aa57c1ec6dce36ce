"""The progress bar of a conversion that takes long."""

from __future__ import annotations

import os
from typing import Any

from transformers.utils.logging import tqdm

#: Seconds that a conversion takes before its bar is shown.
DELAY = 2.0


def speaks() -> bool:
    """Whether this process is the first of its machine, which alone says what all of them do."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def conversion_bar(layers: int, method: str) -> Any:
    """Make a bar on stderr, as a context, for the conversion of so many layers.

    It appears after two seconds, on the first process of each machine, and follows transformers' switch
    (`transformers.utils.logging.disable_progress_bar`), which HF_HUB_DISABLE_PROGRESS_BARS sets at the start.
    """
    quiet = not (layers and speaks())
    return tqdm(total=layers, desc=f"{method}: converting", unit="layer", delay=DELAY, disable=quiet)
