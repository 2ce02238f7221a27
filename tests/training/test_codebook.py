"""The choice of rows that become codes, against a plain computation over all distances."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tar_hf.training.codebook import representative_rows


def table(rows=157, width=12, seed=0):
    embeddings = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return embeddings * torch.linspace(0.5, 2, rows)[:, None]


def by_brute_force(embeddings, k, metric="euclidean"):
    if metric == "cosine":
        distances = 1 - torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    else:
        distances = (embeddings[:, None] - embeddings[None]).norm(dim=-1)
    return distances.double().mean(1).argsort()[:k].sort().values


@pytest.mark.parametrize("chunk", [4096, 157, 50, 1])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_rows_nearest_to_all_others(metric, chunk):
    embeddings = table()
    rows = representative_rows(embeddings, 40, metric=metric, chunk=chunk)
    assert rows.dtype == torch.long and torch.equal(rows, by_brute_force(embeddings, 40, metric))
    assert not torch.equal(rows, by_brute_force(embeddings, 40, "euclidean" if metric == "cosine" else "cosine"))


def test_reduced_precision_is_read_as_float32():
    embeddings = table().bfloat16()
    assert torch.equal(representative_rows(embeddings, 40, chunk=64), by_brute_force(embeddings.float(), 40))


def test_excluded_rows_are_neither_chosen_nor_counted():
    embeddings = table()
    embeddings[100:] += 50  # these would draw the choice to their side
    rows = representative_rows(embeddings, 20, exclude=range(100, 157), chunk=33)
    assert torch.equal(rows, by_brute_force(embeddings[:100], 20))
    assert not torch.equal(rows, representative_rows(embeddings, 20))


def test_the_first_of_equals_are_taken():
    corners = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)]).repeat(8, 1)
    for chunk in (32, 5):
        assert representative_rows(corners, 7, chunk=chunk).tolist() == list(range(7))


def test_memory_does_not_grow_with_the_vocabulary():
    embeddings, largest = table(rows=3001, width=4), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        representative_rows(embeddings, 10, chunk=128)
    assert largest == 128 * 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 158}, r"codes in 1\.\.157, .*got 158"),
        ({"k": 0}, "got 0"),
        ({"k": 150, "exclude": range(10)}, r"1\.\.147, .*157 in the table, 10 of them excluded.*got 150"),
        ({"k": 5, "metric": "manhattan"}, "euclidean, cosine, got 'manhattan'"),
    ],
)
def test_a_choice_that_cannot_be_made(options, message):
    with pytest.raises(ValueError, match=message):
        representative_rows(table(), **options)


def test_values_that_are_not_finite():
    embeddings = table()
    embeddings[3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        representative_rows(embeddings, 5)
