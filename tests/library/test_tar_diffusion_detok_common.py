"""diffusers' common pipeline tests on TarDiffusionDeTokPipeline."""

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from diffusers_tests.pipelines.testing_utils import BasePipelineTesterConfig, LoraTesterMixin, PipelineTesterMixin

from tar_hf import TarDiffusionDeTokPipeline
from tar_hf.modeling.modeling_negative_condition import NegativeCondition


class TarDiffusionDeTokPipelineTesterConfig(BasePipelineTesterConfig):
    """Makes a pipeline of one layer that draws 32 x 32 pixels from features of width 8."""

    pipeline_class = TarDiffusionDeTokPipeline
    required_input_params_in_call_signature = frozenset(["codes", "features", "negative_features", "height", "width"])
    batch_input_params = frozenset(["features"])
    callback_cfg_params = frozenset(["features", "negative_features"])
    output_shape = (3, 32, 32)

    def get_dummy_components(self):
        torch.manual_seed(0)
        negative_condition = NegativeCondition(9, 8)
        torch.nn.init.normal_(negative_condition.features)
        blocks = ("ResBlock", "EfficientViTBlock")
        return {
            "transformer": SanaTransformer2DModel(
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_attention_heads=2,
                attention_head_dim=4,
                num_cross_attention_heads=2,
                cross_attention_head_dim=4,
                cross_attention_dim=8,
                caption_channels=8,
                sample_size=16,
            ),
            "vae": AutoencoderDC(
                latent_channels=4,
                attention_head_dim=2,
                encoder_block_types=blocks,
                decoder_block_types=blocks,
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                encoder_qkv_multiscales=((), (5,)),
                decoder_qkv_multiscales=((), (5,)),
                encoder_layers_per_block=(1, 1),
                decoder_layers_per_block=(1, 1),
                downsample_block_type="conv",
                upsample_block_type="interpolate",
                scaling_factor=0.41407,
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "negative_condition": negative_condition,
            "ta_tok": None,
        }

    def get_dummy_inputs(self):
        return {
            "features": torch.randn(4, 8, generator=self.get_generator(1)),  # shorter than the negative condition
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 4.0,
            "output_type": "pt",
        }


class TestTarDiffusionDeTokPipeline(TarDiffusionDeTokPipelineTesterConfig, PipelineTesterMixin):
    def test_save_load_optional_components(self, tmp_path, expected_max_difference=1e-4):
        # Guidance needs a negative condition, and this test takes the pipeline's own away.
        inputs = {**self.get_dummy_inputs(), "negative_features": torch.zeros(9, 8)}
        self.get_dummy_inputs = lambda: {**inputs, "generator": self.get_generator(0)}
        super().test_save_load_optional_components(tmp_path, expected_max_difference)


class TestTarDiffusionDeTokPipelineLora(TarDiffusionDeTokPipelineTesterConfig, LoraTesterMixin):
    pass
