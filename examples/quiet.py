"""Import this first: silences what libraries say while they are imported.

PEFT imports torchao where it is installed; torchao reports its binaries that are for other machines, and torch an idiom
of torchao's. Neither is about the examples.
"""

import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
