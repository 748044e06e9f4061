"""Language models of Mixture-of-Memories layers, other models, and their parts."""

from keras_mom.models import samplers, tokenizers
from keras_mom.models.backbone import MoMBackbone
from keras_mom.models.causal_attention import CausalAttention
from keras_mom.models.causal_lm import MoMCausalLM
from keras_mom.models.classifier import mom_classifier
from keras_mom.models.decoder_block import MoMDecoderBlock
from keras_mom.models.encoder import mom_encoder
from keras_mom.models.forecaster import mom_forecaster
from keras_mom.models.gated_mlp import GatedMLP
from keras_mom.models.mixture_of_experts import MixtureOfExperts
from keras_mom.models.quantile_loss import QuantileLoss
from keras_mom.models.token_embedding import TokenEmbedding
from keras_mom.models.tokenizers import ByteTokenizer, HuggingFaceTokenizer

__all__ = [
    "ByteTokenizer",
    "CausalAttention",
    "GatedMLP",
    "HuggingFaceTokenizer",
    "MixtureOfExperts",
    "MoMBackbone",
    "MoMCausalLM",
    "MoMDecoderBlock",
    "QuantileLoss",
    "TokenEmbedding",
    "mom_classifier",
    "mom_encoder",
    "mom_forecaster",
    "samplers",
    "tokenizers",
]
