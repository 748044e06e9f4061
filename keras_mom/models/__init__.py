"""Language models of Mixture-of-Memories layers, and their parts."""

from keras_mom.models.gated_mlp import GatedMLP
from keras_mom.models.mixture_of_experts import MixtureOfExperts

__all__ = ["GatedMLP", "MixtureOfExperts"]
