"""What KerasHub asks of a backbone and of a task. Run by `test_keras_hub.py`."""

import os
import re

import keras
import keras_hub
import numpy as np
from keras_hub.src.tests.test_case import TestCase

import keras_mom
from keras_mom.models import MoMBackbone, MoMCausalLM

SIZES = {
    "vocabulary_size": 300,
    "num_layers": 2,
    "hidden_dim": 8,
    "num_heads": 2,
    "key_dim": 4,
    "num_memories": 2,
    "top_k": 1,
    "attention_layers": [1],
}
TEXTS = ["a bird sang", "at dawn"]


class ConformanceTest(TestCase):
    def test_backbone(self):
        data = {
            "token_ids": np.ones((2, 5), "int32"),
            "padding_mask": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], "int32"),
        }
        # It wants no float32 in bfloat16 models, but routers and decays stay float32.
        self.run_backbone_test(
            MoMBackbone, SIZES, data, (2, 5, 8), run_mixed_precision_check=False
        )
        for policy in ("mixed_float16", "mixed_bfloat16", "bfloat16"):
            policy = keras.dtype_policies.get(policy)
            backbone = MoMBackbone(**SIZES, dtype=policy)
            self.assertDTypeEqual(backbone(data), policy.compute_dtype)
            for weight in backbone.weights:
                kept = re.search("router|routing|A_log|dt_bias", weight.path)
                expected = "float32" if kept else policy.variable_dtype
                self.assertDTypeEqual(weight, expected)

    def test_task(self):
        tokenizer = keras_hub.tokenizers.ByteTokenizer()
        tokenizer.start_token_id = tokenizer.pad_token_id = 0
        tokenizer.end_token_id = 1
        preprocessor = keras_hub.models.CausalLMPreprocessor(
            tokenizer, sequence_length=6
        )
        self.run_task_test(
            MoMCausalLM,
            {"backbone": MoMBackbone(**SIZES), "preprocessor": preprocessor},
            train_data=(TEXTS,),
            expected_output_shape=(2, 6, 300),
        )

    def test_presets(self):
        backbone = MoMBackbone(**SIZES)
        folder = os.path.join(self.get_temp_dir(), "preset")
        tokenizer = keras_mom.models.ByteTokenizer()
        MoMCausalLM(backbone, tokenizer).save_to_preset(folder)
        loaded = MoMCausalLM.from_preset(folder)
        self.assertIsInstance(loaded.preprocessor, keras_mom.models.ByteTokenizer)
        loaded.preprocessor = None
        loaded.save_to_preset(folder)
        data = {name: np.ones((2, 5), "int32") for name in backbone.input}
        expected = backbone(data)
        loaded = keras_hub.models.Backbone.from_preset(folder)
        self.assertIsInstance(loaded, MoMBackbone)
        self.assertAllClose(loaded(data), expected)
        model = keras_hub.models.CausalLM.from_preset(folder, dtype="bfloat16")
        self.assertIsInstance(model, MoMCausalLM)
        self.assertEqual(model.backbone.token_embedding.dtype, "bfloat16")
        named = MoMBackbone.from_preset("mom_tiny", num_layers=1)
        self.assertEqual(len(named.blocks), 1)
