"""Import this first: silences what libraries say while they are imported.

PEFT imports torchao where it is installed; torchao reports its binaries that are for other machines, and torch an idiom
of torchao's. In a notebook, tqdm misses widgets. None of that is about the examples.
"""

import logging
import warnings

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="IProgress not found")
