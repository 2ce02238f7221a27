"""Mixtures: ratios, passes, bad rows, and the same samples for any number of workers and processes."""

import logging
import re
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from tar_hf.training.mixture import BLOCK, Mixture, Source, TooManyBadRows
from tar_hf.training.recipe import RecipeError
from tar_hf.training.rows import BadRow


def source(name, rows, ratio=1.0, bad=()):
    return Source(name, [{"name": name, "row": row, "bad": row in bad} for row in range(rows)], ratio)


def reader(raw, draw, folder, task):
    if raw["bad"]:
        raise BadRow("spoilt")
    return raw


def transform(raw, draw):
    return raw["name"], raw["row"], draw.random()


def spoilt_transform(raw, draw):
    if raw["row"] == 0:
        raise BadRow("unfit")
    return raw["row"]


def collate(examples):
    return examples


def mixture(sources, num_samples=None, **options):
    return Mixture(sources, transform, num_samples, **{"reader": reader, "shuffle": num_samples is not None, **options})


def take(samples, start=0, stop=None):
    return [samples[i] for i in range(start, len(samples) if stop is None else stop)]


def test_exact_ratios():
    samples = mixture([source("a", 7, 5), source("b", 1000, 2.5), source("c", 3, 0.5)], 2 * BLOCK)
    for block in range(2):
        counts = Counter(samples.locate(block * BLOCK + i)[0] for i in range(BLOCK))
        assert counts == {0: 2560, 1: 1280, 2: 256}
    assert Counter(name for name, _, _ in take(samples, 0, 400)).keys() == {"a", "b", "c"}  # well mixed


def test_ratios_that_no_block_keeps_exactly():
    samples = mixture([source("a", 7), source("b", 7), source("c", 7)], BLOCK)
    assert sorted(Counter(samples.locate(i)[0] for i in range(BLOCK)).values()) == [1365, 1365, 1366]


def test_every_row_once_a_pass():
    """Also where passes end within blocks, and in another order each time."""
    samples = mixture([source("a", 300, 3), source("b", 1000)], 3 * BLOCK)
    for number, rows in ((0, 300), (1, 1000)):
        order = [row for found, row in map(samples.locate, range(len(samples))) if found == number]
        passes = [order[i : i + rows] for i in range(0, len(order) - rows + 1, rows)]
        assert len(passes) >= 3
        assert all(sorted(rows_of_pass) == list(range(rows)) for rows_of_pass in passes)
        assert passes[0] != passes[1]


def test_one_source_is_a_plain_shuffle():
    samples = mixture([source("a", 50)], 50)
    assert samples.epoch_length == 50
    assert sorted(row for _, row, _ in take(samples)) == list(range(50))


@pytest.mark.parametrize("rows", [(10, 10), (5000, 3), (1, 9000)])
def test_epoch_length_is_the_shortest_that_holds_every_row(rows):
    sources = [source(str(i), n, i + 1) for i, n in enumerate(rows)]
    length = mixture(sources, 1).epoch_length
    samples = mixture(sources, length)
    seen = {samples.locate(i) for i in range(length)}
    assert len(seen) == sum(rows)
    last = samples.locate(length - 1)
    assert last not in {samples.locate(i) for i in range(length - 1)}


def test_samples_depend_on_seed_and_index_alone():
    sources = [source("a", 30), source("b", 100, 2)]
    samples = take(mixture(sources, 500))
    assert take(mixture(sources, 900), 0, 500) == samples
    again = mixture(sources, 500)
    assert [again[i] for i in reversed(range(500))] == samples[::-1]
    assert take(mixture(sources, 500, seed=1)) != samples
    assert len({draw for _, _, draw in samples}) == 500


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_same_samples(context):
    """And count their bad rows together."""
    samples = mixture([source("a", 30, bad=(3, 4)), source("b", 100, 2)], 60)
    expected = [batch for batch in DataLoader(samples, 4, collate_fn=collate)]
    count, samples = samples.bad_rows, mixture([source("a", 30, bad=(3, 4)), source("b", 100, 2)], 60)
    loader = DataLoader(samples, 4, collate_fn=collate, num_workers=2, multiprocessing_context=context)
    assert list(loader) == expected
    assert samples.bad_rows == count == 2


def test_processes_and_resume_cover_the_samples_once():
    samples = mixture([source("a", 30), source("b", 100, 2)], 96)

    def shard(process, processes, batch_size):
        batches = BatchSampler(SequentialSampler(samples), batch_size, drop_last=True)
        batches = BatchSamplerShard(batches, processes, process, even_batches=True)
        return DataLoader(samples, batch_sampler=batches, collate_fn=collate)

    whole = list(shard(0, 1, 8))
    first, second = list(shard(0, 2, 4)), list(shard(1, 2, 4))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert list(skip_first_batches(shard(0, 2, 4), 5)) == first[5:]


def test_bad_rows_are_logged_and_replaced_by_rows_of_their_source(caplog):
    samples = mixture([source("a", 20, bad=(3, 7)), source("b", 20)], 200)
    with caplog.at_level(logging.WARNING, "tar_hf.training.mixture"):
        taken = take(samples)
    assert len(taken) == 200 and not {("a", 3), ("a", 7)} & {(name, row) for name, row, _ in taken}
    expected = Counter("ab"[samples.locate(i)[0]] for i in range(200))
    assert Counter(name for name, _, _ in taken) == expected
    assert samples.bad_rows == 2  # in five passes
    assert {record.message for record in caplog.records} == {f"skipped row {row} of a: spoilt" for row in (3, 7)}
    assert 8 <= len(caplog.records) <= 12
    assert take(samples) == taken  # the replacements too


def test_transforms_may_find_rows_bad():
    samples = Mixture([source("a", 4)], spoilt_transform, 40, reader=reader)
    assert set(take(samples)) == {1, 2, 3} and samples.bad_rows == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows(workers):
    samples = mixture([source("a", 20, bad=range(1, 6))], 200, max_bad_rows=5)
    for _ in DataLoader(samples, 4, collate_fn=collate, num_workers=workers):
        pass
    samples = mixture([source("a", 20, bad=range(1, 6))], 200, max_bad_rows=4)
    batches = iter(DataLoader(samples, 4, collate_fn=collate, num_workers=workers))
    message = r"5 rows could not be read, more than max_bad_rows=4; the last was row [1-5] of a: spoilt"
    with pytest.raises(TooManyBadRows, match=message):
        list(batches)
    if workers:
        batches._shutdown_workers()  # collected with the traceback, they would be waited for
    with pytest.raises(TooManyBadRows, match="1 rows could not be read, more than max_bad_rows=0"):
        take(mixture([source("a", 20, bad=(1,))], 20, max_bad_rows=0))


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_the_limit_alone_counts(bad):
    """A bad row's place may be drawn for the same bad row: that is no other row."""
    samples = mixture([source("a", 4, bad=range(1, 1 + bad))], 200, max_bad_rows=bad)
    assert {row for _, row, _ in take(samples)} == {0, *range(1 + bad, 4)} and samples.bad_rows == bad


def test_a_source_of_bad_rows_alone_is_refused_at_once(caplog):
    for options, tried in (({}, 3), ({"max_bad_rows": 1}, 2)):
        message = f"^a: none of its first {tried} rows can be used, the first of them because spoilt$"
        with pytest.raises(RecipeError, match=message):
            mixture([source("b", 3), source("a", 3, bad=range(3))], 10, **options)
        with pytest.raises(RecipeError, match=message):
            mixture([source("b", 3), source("a", 3, bad=range(3))], **options)
    assert not caplog.records
    assert mixture([source("a", 3, bad=(0, 1))], 10).bad_rows == 0  # none is counted yet


def test_bad_rows_alone_have_an_end():
    """Where the first rows were good when it was made: fewer rows than may be bad never reach the limit."""
    samples = mixture([source("a", 3)], 10)
    samples.sources = [source("a", 3, bad=range(3))]
    with pytest.raises(TooManyBadRows, match="101 rows of a in a row could not be read"):
        samples[0]


def test_held_out_rows_come_in_order():
    samples = mixture([source("a", 3, 0.1), source("b", 2, 5)])
    assert [(name, row) for name, row, _ in take(samples)] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert take(samples) == take(samples)


def test_wrong_mixtures():
    for sources, message in (
        (lambda: [source("a", 0)], "a has no rows"),
        (lambda: [source("a", 1, 0)], "a needs a ratio above 0, got 0"),
        (lambda: [source("a", 1, float("nan"))], "a needs a ratio above 0"),
        (lambda: [source("a", 1, float("inf"))], "a needs a ratio above 0"),
        (lambda: [source("a", 1), source("b", 1, 0.0001)], "at least 1/4096"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture(sources(), 10)
    for options in ({"num_samples": None, "shuffle": True}, {"num_samples": 3, "shuffle": False}):
        with pytest.raises(ValueError, match="num_samples belongs to"):
            Mixture([source("a", 1)], transform, **options)
    with pytest.raises(RecipeError, match="max_bad_rows must be at least 0, got -1"):
        mixture([source("a", 1)], 10, max_bad_rows=-1)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=re.escape(f"expected a sample in 0..9, got {index}")):
            mixture([source("a", 1)], 10)[index]
