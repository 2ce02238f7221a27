"""What guidance steers the diffusion de-tokenizer away from: one sequence of features, kept like a model's weights.

Original file: `negative_prompt_embeds.pth` beside the published SANA de-tokenizers.

This file travels with converted checkpoints, so it imports nothing else of the package.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class NegativeCondition(ModelMixin, ConfigMixin):
    """
    The negative condition as a component of [`TarDiffusionDeTokPipeline`]: cast, moved, offloaded and saved with it.

    Args:
        num_tokens (`int`, *optional*, defaults to `729`): n, its length.
        hidden_size (`int`, *optional*, defaults to `1152`): C, the width of the TA-Tok features.
    """

    @register_to_config
    def __init__(self, num_tokens: int = 729, hidden_size: int = 1152):
        super().__init__()
        self.features = nn.Parameter(torch.zeros(num_tokens, hidden_size))

    def forward(self) -> torch.Tensor:
        """The features (n, C)."""
        return self.features


__all__ = ["NegativeCondition"]
