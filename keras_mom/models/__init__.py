"""Language models, and what they are trained and generate with."""

from keras_mom.models import samplers, tokenizers
from keras_mom.models.tokenizers import ByteTokenizer, HuggingFaceTokenizer

__all__ = ["ByteTokenizer", "HuggingFaceTokenizer", "samplers", "tokenizers"]
