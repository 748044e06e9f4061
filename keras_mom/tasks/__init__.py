"""Tasks that ask a model what it remembers: seeded data, made on the spot.

Every function returns `Examples`, NumPy arrays for
`model.fit(inputs, targets, sample_weight=weights)`.
"""

from keras_mom.tasks.draws import Examples
from keras_mom.tasks.mad import (
    compression,
    fuzzy_in_context_recall,
    in_context_recall,
    memorization,
    noisy_in_context_recall,
    selective_copying,
)
from keras_mom.tasks.mqar import multi_query_recall
from keras_mom.tasks.needle import needle_in_a_haystack
from keras_mom.tasks.phone_book import phone_book

__all__ = [
    "Examples",
    "compression",
    "fuzzy_in_context_recall",
    "in_context_recall",
    "memorization",
    "multi_query_recall",
    "needle_in_a_haystack",
    "noisy_in_context_recall",
    "phone_book",
    "selective_copying",
]
