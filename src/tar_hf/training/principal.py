"""What a sample of pictures says about features before a TA-Tok learns them: their principal directions.

A teacher's features vary mostly along few directions, and a cosine is content with those; a fresh bottleneck sends all
of a small model's features to a few codes. Neither matters at the published size, where both were trained for long;
both keep a small tokenizer from ever using its codebook.

Shapes: T features, C their width; K codes of D coordinates.
"""

from dataclasses import dataclass

import torch

from tar_hf.modeling.modeling_ta_tok import TATokModel


@dataclass(frozen=True)
class Principal:
    """
    Args:
        mean (`torch.FloatTensor` of shape `(C,)`): Of the features.
        directions (`torch.FloatTensor` of shape `(C, C)`): Columns, the one of the largest variance first.
        variances (`torch.FloatTensor` of shape `(C,)`): Along them.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Principal":
        """Of features (T, C), computed in float64."""
        features = features.double()
        mean = features.mean(0)
        variances, directions = torch.linalg.eigh((features - mean).mT @ (features - mean) / len(features))
        # A direction's sign is arbitrary: fixed, so that every machine starts alike.
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        return cls(mean.float(), directions.flip(-1).float(), variances.clamp(min=0).flip(-1).float())

    def whitening(self, strength: float) -> torch.Tensor:
        """
        (C, C), from centred features to principal coordinates, each divided by its deviation to the power `strength`: 0
        only turns them, 1 gives all one variance. Less than 1 % of the mean variance counts as that.
        """
        floor = self.variances.mean() / 100
        return self.directions / self.variances.clamp(min=floor).sqrt() ** strength


@torch.no_grad()
def spread_over_codes(model: TATokModel, pre_quantized: torch.Tensor, directions: int, seed: int = 0):
    """
    Sets the bottleneck of a fresh TA-Tok so that its features fall on many codes from the first step on.

    The features' and the codebook's principal coordinates, each of variance 1, are brought into one space of few
    dimensions, where nearest codes are near.

    Args:
        model (`TATokModel`): Whose `in_proj` and `quantizer.embedding_proj` are set.
        pre_quantized (`torch.FloatTensor` of shape `(T, C)`): A sample of what the model gives before the bottleneck.
        directions (`int`): Dimensions of that space, at most D and C.
        seed (`int`, *optional*, defaults to `0`): Draws how the codebook lies in it.
    """
    embeddings = model.quantizer.embedding.weight.float()
    if not 1 <= directions <= min(pre_quantized.shape[-1], *embeddings.shape):
        raise ValueError(
            f"principal_directions must be in 1..{min(pre_quantized.shape[-1], *embeddings.shape)}, got {directions}"
        )
    generator = torch.Generator().manual_seed(seed)
    dim = embeddings.shape[1]
    space, turned = (torch.linalg.qr(torch.randn(dim, directions, generator=generator))[0] for _ in range(2))
    space, turned = space.to(embeddings.device), turned.to(embeddings.device)
    features, codes = Principal.of(pre_quantized), Principal.of(embeddings)
    for linear, principal, turn in (
        (model.in_proj, features, features.whitening(1)[:, :directions]),
        (model.quantizer.embedding_proj, codes, codes.whitening(1) @ turned),
    ):
        linear.weight.copy_(space @ turn.mT)
        linear.bias.copy_(-(linear.weight.float() @ principal.mean))
