"""What `QuantizationCallback` costs: seconds a look, beside seconds a step, in a training as TRL does it.

    python benchmarks/monitor.py --out benchmarks/results/monitor.json     # 7B shapes
    python benchmarks/monitor.py --smoke                                   # does it run (on a CPU)

`SFTTrainer` with its defaults (a log every 10 steps) on random weights in Llama's shapes. A look is timed by the
callback itself, after the Trainer has waited for the GPU to tell the loss.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_json
from gpu import SHAPES, fill, skeleton
from sft import Clock, trainer_of

from peft_lrqat import LRQATConfig, QuantizationCallback


class Timed(QuantizationCallback):
    """Keeps the seconds of every look."""

    def __init__(self) -> None:
        super().__init__(plot=False)
        self.looks: list[float] = []

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._took = 0.0
        super().on_log(*args, **kwargs)
        if self._took:
            self.looks.append(self._took)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, help="fewer blocks than the size has")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.smoke:
        args.size, args.length = "tiny", 16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = skeleton(args.size, args.layers, keep_rng_state=True)
    fill(model, device)
    rows = torch.randint(3, 32000, (args.batch * args.steps, args.length), generator=torch.Generator().manual_seed(1))
    clock, monitor = Clock(device, 5), Timed()
    with tempfile.TemporaryDirectory() as folder:
        config = LRQATConfig(
            downcast="int",
            range_method="minmax",
            task_type="CAUSAL_LM",
            target_modules="all-linear",
            **({"group_size": 32} if args.smoke else {}),
        )
        options = {"max_steps": args.steps, "per_device_train_batch_size": args.batch}
        trainer = trainer_of(model, config, rows, device, folder, [clock, monitor], **options)
        trainer.train()
    look = statistics.median(monitor.looks[1:] or monitor.looks)  # the first compiles
    step = statistics.median(clock.seconds())
    found = {
        "look_seconds": look,
        "first_look_seconds": monitor.looks[0],
        "step_seconds": step,
        "logging_steps": trainer.args.logging_steps,
        "share_percent": 100 * look / (trainer.args.logging_steps * step),
        "layers": sum(name.endswith("_proj") for name, _ in model.named_modules()),
    }
    print(found)
    if args.out:
        command = {key: value for key, value in vars(args).items() if key != "out"}
        write_json(args.out, {"runs": [{**found, "command": command, **provenance()}]})


if __name__ == "__main__":
    main()
