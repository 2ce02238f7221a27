"""transformers' common model tests on ARDeTokForCausalLM and on the decoder inside it."""

import unittest

import torch
from skips import apply_skips
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor

from tar_hf import ARDeTokConfig, ARDeTokForCausalLM
from tar_hf.modeling.modeling_ar_detok import ARDeTokModel

# The common tests tell by class name which head a model has, and only know the library's own.
MODEL_MAPPING_NAMES["ar_detok"] = "ARDeTokModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ar_detok"] = "ARDeTokForCausalLM"
# They also look for the model without head behind AutoModel, where the package offers none: it draws nothing.
AutoModel.register(ARDeTokConfig, ARDeTokModel)


class ARDeTokModelTester:
    """Makes a two-layer model that draws 2 x 2 tokens. The common tests read its sizes from the attributes."""

    is_training = True
    batch_size = 3
    condition_length = 5
    num_image_tokens = 4
    seq_length = condition_length + num_image_tokens - 1  # the last token is never fed back
    vocab_size = 64
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def prepare_config_and_inputs_for_common(self):
        config = ARDeTokConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            condition_size=16,
            max_condition_tokens=self.condition_length,
            vq_config={
                "num_embeddings": self.vocab_size,
                "embed_dim": 4,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 2,
            },
        )
        condition = floats_tensor([self.batch_size, self.condition_length, config.condition_size])
        input_ids = ids_tensor([self.batch_size, self.num_image_tokens - 1], self.vocab_size)
        return config, {"input_ids": input_ids, "condition": condition}


@apply_skips
class ARDeTokModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ARDeTokModel, ARDeTokForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # the file has no copyright line to read a year from
    _is_composite = True

    def setUp(self):
        self.model_tester = ARDeTokModelTester()

    def test_sdpa_can_dispatch_non_composite_models(self):
        self._is_composite = False  # skips.py says why this test rather than the one for composite models
        super().test_sdpa_can_dispatch_non_composite_models()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs_dict:  # one for each token of the image, none for the condition
            shape = (self.model_tester.batch_size, self.model_tester.num_image_tokens)
            inputs_dict["labels"] = torch.zeros(shape, dtype=torch.long, device=inputs_dict["labels"].device)
        return inputs_dict
