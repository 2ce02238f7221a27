"""Weighted mixtures of streams: rows in the order of the files, through a shuffle buffer, where a data set is too large
to be memory-mapped or is read from the Hub.

Every reader, which is one DataLoader worker of one process, reads a share of every source that no other reader has:
whole files as far as each gets as many, and every n-th row of the rest.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import fsspec.asyn
import pyarrow as pa
import torch

from tar_hf.training.mixture import BadRows, Source, check_first_rows, make_block
from tar_hf.training.recipe import DataRecipe, RecipeError, SourceRecipe
from tar_hf.training.rows import BadRow, Row, read_row
from tar_hf.training.sources import arrow_row, load, parse_limit, plain_row

TABLE = 64  # rows that are decoded at a time


class Stream(torch.utils.data.IterableDataset):
    """
    Endless samples of several streams in proportion, each source shuffled anew on every pass through it.

    What a reader gives depends on the seed and on the number of readers alone, so that a resumed run, which skips the
    samples that were used (as Trainer does), goes on as an unbroken one. Rows and ratios are those of a `Mixture`; the
    samples are others.

    Several processes: `accelerate` has each of them read the whole of an iterable data set, and keep one batch of
    `num_processes`. The other batches are `None` here, so that no process reads the pictures of another.

    Args:
        sources (`list[Source]`): What to draw from; `rows` are streams of `datasets`.
        firsts (`list[int | None]`): For each source the number of its first rows that take part, or all.
        transform (`Callable[[Row, random.Random], Any]`): As in `Mixture`.
        shuffle_buffer (`int`, *optional*, defaults to `10000`): Rows of each source that a reader draws from. They are
            kept in memory, pictures and all; `1` leaves the order of the files.
        seed, max_bad_rows, reader: As in `Mixture`.
        batch_size, process_index, num_processes (`int`, *optional*): Of the DataLoader, and of `accelerate`.
    """

    def __init__(
        self,
        sources: list[Source],
        firsts: list[int | None],
        transform: Callable[[Row, random.Random], Any],
        shuffle_buffer: int = 10000,
        seed: int = 0,
        max_bad_rows: int = 100,
        reader: Callable[..., Row] = read_row,
        batch_size: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if shuffle_buffer < 1:
            raise RecipeError(f"shuffle_buffer must be at least 1, which shuffles nothing, got {shuffle_buffer}")
        self.sources = sources
        self.firsts = firsts
        self.transform = transform
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.reader = reader
        self.batch_size = batch_size
        self.process_index = process_index
        self.num_processes = num_processes
        self._bad_rows = BadRows(max_bad_rows)
        make_block([source.ratio for source in sources], seed)  # raises for ratios that cannot be kept
        for source in sources:
            first = _arrow_rows(source.rows.take(max_bad_rows + 1))
            check_first_rows(source.name, (functools.partial(self._sample, source, arrow_row(row)) for row in first))

    @property
    def bad_rows(self) -> int:
        """Rows skipped so far."""
        return self._bad_rows.count

    def __iter__(self) -> Iterator[Any]:
        workers, worker = 1, 0
        if info := torch.utils.data.get_worker_info():
            workers, worker = info.num_workers, info.id
            fsspec.asyn.reset_lock()  # a forked copy of a held lock would wait forever
        samples = self._samples(self.process_index * workers + worker, self.num_processes * workers)
        while True:
            for process in range(self.num_processes):
                for _ in range(self.batch_size):
                    yield next(samples) if process == self.process_index else None

    def _samples(self, reader, readers):
        schedule, _, _ = make_block([source.ratio for source in self.sources], [self.seed, reader])
        streams = [self._rows(number, reader, readers) for number in range(len(self.sources))]
        for index, number in enumerate(itertools.cycle(schedule)):
            source = self.sources[number]
            draw = random.Random(f"{self.seed}/{reader}/{index}")
            for _ in self._bad_rows.attempts(source.name):
                name, stored = next(streams[number])
                try:
                    sample = self._sample(source, stored, draw)
                except BadRow as error:
                    self._bad_rows.add(name, error)
                else:
                    yield sample
                    break

    def _sample(self, source, stored, draw):
        return self.transform(self.reader(plain_row(stored), draw, source.folder, source.task), draw)

    def _rows(self, number, reader, readers):
        """Rows of a reader's share, pass after pass: what to call each, and its stored columns."""
        for passes in itertools.count():
            share = self._share(number, passes, reader, readers)
            draw = random.Random(f"{self.seed}/{number}/{passes}/{reader}")
            empty = True
            for row in _shuffled(share, self.shuffle_buffer, draw):
                yield row
                empty = False
            if empty:
                raise RecipeError(
                    f"{self.sources[number].name} has no rows for reader {reader} of {readers} (workers of all "
                    "processes): use fewer dataloader workers, or streaming: false"
                )

    def _share(self, number, passes, reader, readers):
        source, first = self.sources[number], self.firsts[number]
        stream = source.rows
        order = list(range(stream.n_shards if first is None else 1))
        if self.shuffle_buffer > 1:
            random.Random(f"{self.seed}/{number}/{passes}").shuffle(order)  # the same for all readers
        whole = len(order) // readers * readers  # so many files are read by one each, and the rest by all
        rows = divided = 0
        for turn, file in enumerate(order):
            if turn < whole and turn % readers != reader:
                continue
            # A shard is costly to name where there are thousands: one's own alone.
            own = stream.take(first) if first is not None else stream.shard(stream.n_shards, file, contiguous=False)
            for place, single in enumerate(_arrow_rows(own)):
                if turn < whole or divided % readers == reader:
                    yield f"row {place} of file {file} of {source.name}", arrow_row(single)
                divided += turn >= whole
                rows += 1
        if first is not None and rows < first:
            raise RecipeError(f"{source.name} has {rows} rows, so limit first:{first} cannot be kept")


def open_stream(
    data: DataRecipe,
    transform: Callable[[Row, random.Random], Any],
    reader: Callable[..., Row] = read_row,
    seed: int = 0,
    **loading: int,
) -> Stream:
    """
    The sources of a recipe as one stream. `loading` are `batch_size`, `process_index` and `num_processes` of `Stream`.

    Raises `RecipeError` where a limit needs all rows at hand, and what `load` raises.
    """
    firsts = [_first(source) for source in data.sources]
    loaded = [load(source, streaming=True) for source in data.sources]
    sources = [
        Source(recipe.path, rows, float(recipe.ratio), folder, recipe.task)
        for recipe, (rows, folder) in zip(data.sources, loaded, strict=True)
    ]
    return Stream(sources, firsts, transform, data.shuffle_buffer, seed, data.max_bad_rows, reader, **loading)


def _first(recipe: SourceRecipe) -> int | None:
    limit = parse_limit(recipe)
    if limit is None:
        return None
    how, amount, percent = limit
    if how != "first" or percent:
        raise RecipeError(f"{recipe.path}: a stream can be limited to first:N only, got {recipe.limit!r}")
    return amount


def _arrow_rows(stream: datasets.IterableDataset) -> Iterator[pa.Table]:
    """The rows as tables of one."""
    # By `iter`: plain iteration in a DataLoader worker has `datasets` divide the rows once more.
    tables = stream.with_format("arrow").iter(batch_size=TABLE)
    return (table.slice(i, 1) for table in tables for i in range(len(table)))


def _shuffled(rows, size, draw):
    """Rows through a buffer. (That of `datasets` joins them to one Arrow table, which ends at 2 GiB of pictures.)"""
    if size == 1:
        yield from rows
        return
    buffer = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        place = draw.randrange(size)
        yield buffer[place]
        buffer[place] = row
    draw.shuffle(buffer)
    yield from buffer
