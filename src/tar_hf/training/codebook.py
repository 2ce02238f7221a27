"""Which rows of a language model's embedding table become the codes of an image tokenizer."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

METRICS = ("euclidean", "cosine")


@torch.no_grad()
def representative_rows(
    embeddings: torch.Tensor,
    k: int,
    metric: str = "euclidean",
    exclude: Iterable[int] = (),
    chunk: int = 4096,
) -> torch.LongTensor:
    """
    The `k` rows with the smallest average distance to all others (paper 2506.18898, section 3.1).

    Distances are taken chunk against chunk, in float32, on the device of the embeddings: beside the table itself, the
    memory does not depend on V.

    Args:
        embeddings (`torch.Tensor` of shape `(V, D)`): One row a token, in any floating-point type.
        k (`int`): How many rows to choose.
        metric (`str`, *optional*, defaults to `"euclidean"`): Or `"cosine"`: 1 - cosine, whatever the lengths.
        exclude (`Iterable[int]`, *optional*): Rows that are neither chosen nor counted among the others, such as those
            that no training touched: near zero, they would be close to everything.
        chunk (`int`, *optional*, defaults to `4096`): Rows on either side of a block of distances.

    Returns:
        `torch.LongTensor` of shape `(k,)`: the rows in ascending order, on the CPU. Of equals the first are taken.

    Raises:
        `ValueError`: fewer than `k` rows to choose from, another metric, or values that are not finite.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    candidates = torch.ones(len(embeddings), dtype=torch.bool)
    candidates[list(exclude)] = False
    candidates = candidates.nonzero()[:, 0]
    if not 0 < k <= len(candidates):
        raise ValueError(
            f"expected a number of codes in 1..{len(candidates)}, the rows to choose from ({len(embeddings)} in the "
            f"table, {len(embeddings) - len(candidates)} of them excluded), got {k}"
        )

    def vectors(ids):
        rows = embeddings[ids.to(embeddings.device)].float()
        return F.normalize(rows, dim=-1) if metric == "cosine" else rows

    totals = []
    for ids in candidates.split(chunk):
        rows = vectors(ids)
        total = torch.zeros(len(rows), dtype=torch.float64)  # on the CPU: not every device has float64
        for others in map(vectors, candidates.split(chunk)):
            distances = torch.cdist(rows, others) if metric == "euclidean" else 1 - rows @ others.mT
            total += distances.sum(-1).cpu()
        totals.append(total)
    totals = torch.cat(totals)
    if not totals.isfinite().all():
        raise ValueError("the embeddings hold values that are not finite, or too large to take distances of")
    return candidates[totals.sort(stable=True).indices[:k]].sort().values
