"""Training with the probabilities of a teacher, the float model as a rule, in place of the next token alone."""

from .loss import TopK, distillation_loss

__all__ = ["TopK", "distillation_loss"]
