"""Language models from published checkpoints, and back."""

from keras_mom.convert.checkpoint import Checkpoint
from keras_mom.convert.fla import fla_config_of, from_fla, to_fla

__all__ = ["Checkpoint", "fla_config_of", "from_fla", "to_fla"]
