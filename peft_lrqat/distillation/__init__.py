"""Training with the probabilities of a teacher, the float model as a rule, in place of the next token alone."""

from .callback import Distillation
from .loss import TopK, distillation_loss
from .stored import store_logits

__all__ = ["Distillation", "TopK", "distillation_loss", "store_logits"]
