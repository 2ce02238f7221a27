"""What a sample of pictures says about features before a TA-Tok learns them: their principal directions.

A teacher's features vary mostly along few directions, and a cosine is content with those; a fresh bottleneck sends all
of a small model's features to a few codes. Neither matters at the published size, where both were trained for long;
both keep a small tokenizer from ever using its codebook.

The directions are those of the features as they are, not of their distance from their mean: what is near the mean, such
as a grey background, would have no direction left but noise.

Shapes: T features, C their width; K codes of D coordinates.
"""

from dataclasses import dataclass

import torch

from tar_hf.modeling.modeling_ta_tok import TATokModel
from tar_hf.training.alike import one_of_each, shared_by_alike


@dataclass(frozen=True)
class Principal:
    """
    Args:
        directions (`torch.FloatTensor` of shape `(C, C)`): Columns, the one of the largest mean square first.
        squares (`torch.FloatTensor` of shape `(C,)`): The features' mean squares along them.
    """

    directions: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Principal":
        """Of features (T, C), computed in float64 on the CPU: not every device has it. The result is where they are."""
        device, features = features.device, features.cpu().double()
        squares, directions = torch.linalg.eigh(features.mT @ features / len(features))
        # A direction's sign is arbitrary: fixed, so that every machine starts alike.
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        squares = squares.clamp(min=0)
        return cls(directions.flip(-1).float().to(device), squares.flip(-1).float().to(device))

    def whitening(self, strength: float) -> torch.Tensor:
        """
        (C, C), from features to principal coordinates, each divided by its root mean square to the power `strength`: 0
        only turns them, 1 makes all alike. What is below 1 % of the average square counts as that.
        """
        return self.directions / self.squares.clamp(min=self.squares.mean() / 100).sqrt() ** strength


@torch.no_grad()
def spread_over_codes(
    model: TATokModel,
    pre_quantized: torch.Tensor,
    directions: int,
    seed: int = 0,
    kinds: torch.Tensor | None = None,
):
    """
    Sets the bottleneck of a fresh TA-Tok so that its features fall on many codes from the first step on.

    Few of the features' principal coordinates, whitened, become the space of the codes, where nearest codes are near,
    and the codebook gets their mean and covariance there.

    Args:
        model (`TATokModel`): Whose `in_proj` and `quantizer.embedding_proj` are set.
        pre_quantized (`torch.FloatTensor` of shape `(T, C)`): A sample of what the model gives before the bottleneck.
        directions (`int`): Dimensions of that space, at most C, D and K - 1.
        seed (`int`, *optional*, defaults to `0`): Draws how the codebook lies in it.
        kinds (`torch.LongTensor` of shape `(T,)`, *optional*): Numbers of patches that look alike. With them the
            coordinates are those of what such patches share.
    """
    pre_quantized, shared = pre_quantized.cpu(), torch.eye(pre_quantized.shape[-1])
    if kinds is not None:
        shared = shared_by_alike(pre_quantized, kinds)
        pre_quantized = one_of_each(pre_quantized, kinds) @ shared
    embeddings = model.quantizer.embedding.weight.cpu().double()
    limit = min(pre_quantized.shape[-1], embeddings.shape[1], embeddings.shape[0] - 1)
    if not 1 <= directions <= limit:
        raise ValueError(f"principal_directions must be in 1..{limit}, got {directions}")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, embeddings.shape[1], directions, generator=generator, dtype=torch.float64)
    space, turn = torch.linalg.qr(draws)[0]  # orthonormal columns, (D, directions) each

    whitening = Principal.of(pre_quantized).whitening(1)[:, :directions].double()
    coordinates = pre_quantized.double() @ whitening
    _set(model.in_proj, space @ (shared.double() @ whitening).mT, torch.zeros_like(space[:, 0]))

    mean = embeddings.mean(0)
    spread = Principal.of(embeddings - mean).whitening(1).double() @ turn  # embeddings -> uncorrelated coordinates
    spread = spread @ torch.linalg.cholesky(coordinates.mT.cov() + 1e-6 * torch.eye(directions).to(spread)).mT
    _set(model.quantizer.embedding_proj, space @ spread.mT, space @ (coordinates.mean(0) - mean @ spread))


def _set(linear, weight, bias):
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
