"""Language models of Mixture-of-Memories layers, and their parts."""

from keras_mom.models import samplers, tokenizers
from keras_mom.models.backbone import MoMBackbone
from keras_mom.models.causal_attention import CausalAttention
from keras_mom.models.causal_lm import MoMCausalLM
from keras_mom.models.decoder_block import MoMDecoderBlock
from keras_mom.models.gated_mlp import GatedMLP
from keras_mom.models.mixture_of_experts import MixtureOfExperts
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
    "samplers",
    "tokenizers",
]
