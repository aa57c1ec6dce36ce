"""What the command `peft-lrqat` does. What can be typed is in `_peft_lrqat_cli`, which is there without torch."""
