"""Language models of Mixture-of-Memories layers, and their parts."""

from keras_mom.models.classifier import mom_classifier
from keras_mom.models.encoder import mom_encoder
from keras_mom.models.forecaster import mom_forecaster
from keras_mom.models.gated_mlp import GatedMLP
from keras_mom.models.mixture_of_experts import MixtureOfExperts
from keras_mom.models.quantile_loss import QuantileLoss

__all__ = [
    "GatedMLP",
    "MixtureOfExperts",
    "QuantileLoss",
    "mom_classifier",
    "mom_encoder",
    "mom_forecaster",
]
