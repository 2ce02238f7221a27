"""transformers' common model tests on TATokModel."""

import unittest

from skips import apply_skips
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor

from tar_hf import TATokConfig, TATokModel

# The common tests tell by class name which head a model has, and only know the library's own.
MODEL_MAPPING_NAMES["ta_tok"] = "TATokModel"


class TATokModelTester:
    """Makes a two-layer model over 6 x 6 patches. The common tests read its sizes from the attributes."""

    is_training = True
    batch_size = 3
    image_size = 12
    patch_size = 2
    seq_length = 36
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def prepare_config_and_inputs_for_common(self):
        tower = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 37,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
        }
        config = TATokConfig(
            encoder_config={**tower, "image_size": self.image_size, "patch_size": self.patch_size},
            decoder_config={**tower, "num_channels": 16, "patch_size": 1, "num_patches": self.seq_length},
            codebook_size=64,
            codebook_dim=16,
        )
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return config, {"pixel_values": pixel_values}


@apply_skips
class TATokModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (TATokModel,)
    test_resize_embeddings = False  # no tokens come in
    test_can_init_all_missing_weights_before_2023 = True  # the file has no copyright line to read a year from
    _is_composite = True

    def setUp(self):
        self.model_tester = TATokModelTester()

    def test_sdpa_can_dispatch_non_composite_models(self):
        self._is_composite = False  # skips.py says why this test rather than the one for composite models
        super().test_sdpa_can_dispatch_non_composite_models()
