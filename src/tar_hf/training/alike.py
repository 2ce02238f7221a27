"""Pieces of pictures that look alike, and what their features share.

A network's feature of a patch also tells where the patch is and what else the picture shows. To a quantiser that is as
good a reason for another code as any: plain ground then fills a small codebook, and which of its codes comes where is
noise that whoever predicts them has to learn.

Shapes: B pictures, S x S pixels, N patches of each, T of all; C the width of a feature.
"""

import torch
import torch.nn.functional as F

from tar_hf.modeling.modeling_ta_tok import mean_of_kind


def look_alike(pixel_values: torch.Tensor, patch_size: int, surroundings: int = 0) -> torch.Tensor:
    """
    Pictures (B, 3, S, S) in -1..1 -> a number for each patch (B, N), the same for those that look alike, up to 1/128.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(B, 3, S, S)`): Pictures.
        patch_size (`int`): Side of a patch. Pixels beyond the last whole patch count for none.
        surroundings (`int`, *optional*, defaults to `0`): How many pixels around them have to look alike, too. Outside
            a picture goes on as at its border.
    """
    whole = pixel_values.shape[-1] // patch_size * patch_size
    pixels = F.pad(pixel_values[..., :whole, :whole].float(), [surroundings] * 4, mode="replicate")
    patches = F.unfold(pixels, patch_size + 2 * surroundings, stride=patch_size).mT
    draws = torch.randint(-(2**62), 2**62, patches.shape[-1:], generator=torch.Generator().manual_seed(0))
    return ((patches * 64).round().long() * draws.to(patches.device)).sum(-1)  # a hash: overflow is welcome


def shared_by_alike(features: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """
    The linear map (C, C), from the right, that takes a feature to the best guess of the mean of those of its kind: a
    Wiener filter, 1 - within / whole for mean squares within kinds and as a whole.

    Args:
        features (`torch.FloatTensor` of shape `(T, C)`): Of patches.
        kinds (`torch.LongTensor` of shape `(T,)`): From 0, the same number for those that look alike.

    Raises:
        `ValueError`: no two patches look alike.
    """
    device, features, kinds = features.device, features.cpu().double(), kinds.cpu()
    counts = kinds.bincount()
    if (counts < 2).all():
        raise ValueError("no two patches of the sample look alike")
    means = mean_of_kind(features[None], kinds[None])[0]
    several = counts[kinds] > 1  # a single one is its own mean
    counts = counts[kinds][several].double()
    apart = (features - means)[several] * (counts / (counts - 1)).sqrt()[:, None]
    within, whole = apart.mT @ apart / len(apart), features.mT @ features / len(features)
    whole += torch.eye(len(whole)).to(whole) * whole.trace() / len(whole) / 100  # as in `Principal.whitening`
    return torch.linalg.solve(whole, whole - within).float().to(device)


def one_of_each(features: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Of features (T, C) the first of each kind, so that plain ground counts no more than a corner does."""
    kinds = kinds.to(features.device)
    order = kinds.argsort(stable=True)
    new = torch.ones_like(kinds, dtype=torch.bool)
    new[1:] = kinds[order][1:] != kinds[order][:-1]
    return features[order[new]]
