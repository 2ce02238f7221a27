"""Weighted mixtures of sources as one data set of a fixed length, which any process can read at any place.

Everything that is drawn for sample n depends on the seed and on n alone: the source, the row, and what a row leaves
open. So ranks and workers share the samples without talking to each other, and a resumed run goes on with the next one.
"""

import functools
import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import multiprocessing

from tar_hf.training.recipe import RecipeError
from tar_hf.training.rows import BadRow, Row, SeveralFolders, read_row

logger = logging.getLogger(__name__)

BLOCK = 4096  # samples in which the ratios are kept exactly, up to rounding


class TooManyBadRows(RuntimeError):
    """More rows than allowed could not be read."""


class BadRows:
    """
    Counts and logs the rows that are skipped, over all workers of a process, and raises at more than `limit`.

    A row that comes again, in another pass or evaluation, is logged again but counted once.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise RecipeError(f"max_bad_rows must be at least 0, got {limit}")
        self.limit = limit
        shared = multiprocessing.get_context("spawn")  # whose locks go to forked workers too
        self._known = shared.Array("q", limit + 1)
        self._count = shared.Value("l", 0)

    @property
    def count(self) -> int:
        return self._count.value

    def add(self, row: str, error: BadRow):
        """`row` says which one it is: its number and its source."""
        logger.warning("skipped %s: %s", row, error)
        key = int.from_bytes(hashlib.blake2b(row.encode(), digest_size=8).digest(), "big", signed=True)
        with self._count.get_lock():
            if key in self._known[: self._count.value]:
                return
            if self._count.value <= self.limit:
                self._known[self._count.value] = key
            self._count.value += 1
            count = self._count.value
        if count > self.limit:
            raise TooManyBadRows(
                f"{count} rows could not be read, more than max_bad_rows={self.limit}; the last was {row}: {error}"
            ) from error

    def attempts(self, source: str) -> Iterator[None]:
        """As many turns as it may take to find a row that is not bad: a source of bad rows alone would have no end."""
        turns = max(self.limit, 100) + 1  # with a low limit too: the same bad row may be drawn again
        yield from repeat(None, turns)
        raise TooManyBadRows(f"{turns} rows of {source} in a row could not be read: see the log lines above")


def check_first_rows(source: str, samples: Iterable[Callable[[random.Random], Any]]):
    """
    Raises a `RecipeError` where no sample can be made of a source's first rows, as many as may be bad and one more: not
    single rows are wrong then, but what the recipe says of them. Reads one row where it is good.
    """
    reasons = []
    for sample in samples:
        try:
            sample(random.Random(0))
            return
        except BadRow as error:
            reasons.append(error)
    if reasons:
        raise RecipeError(
            f"{source}: none of its first {len(reasons)} rows can be used, the first of them because {reasons[0]}"
        ) from reasons[0]


@dataclass
class Source:
    """
    Args:
        name (`str`): What log lines call it.
        rows (`Sequence[dict]`): The rows' columns, such as `tar_hf.training.sources.open_source` gives them.
        ratio (`float`): Share in the mixture, relative to the others'.
        folder (`str` or `SeveralFolders`, *optional*): What relative picture paths start from.
        task (`str`, *optional*): For rows of a picture and a caption.
        numbers (`Sequence[int]`, *optional*): What the rows' numbers are in the whole source, where a limit chose them.
    """

    name: str
    rows: Sequence[dict]
    ratio: float = 1.0
    folder: str | SeveralFolders | None = None
    task: str | None = None
    numbers: Sequence[int] | None = None

    def number(self, row: int) -> int:
        """A row's number in the whole source."""
        return row if self.numbers is None else int(self.numbers[row])

    def __post_init__(self):
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"{self.name} needs a ratio above 0, got {self.ratio}: leave it out instead")


class Mixture(torch.utils.data.Dataset):
    """
    Samples of several sources in proportion, each source shuffled anew on every pass through it.

    Args:
        sources (`list[Source]`): What to draw from.
        transform (`Callable[[Row, random.Random], Any]`): Makes an example of a row. The second argument is for its
            own draws. A `BadRow` that it raises counts as one of the source.
        num_samples (`int`): Length. Without shuffling, by default each row once.
        seed (`int`, *optional*, defaults to `0`): Of everything drawn.
        max_bad_rows (`int`, *optional*, defaults to `100`): How many rows may be bad, counted over the workers of this
            process. Each is logged, and another row of the same source takes its place.
        shuffle (`bool`, *optional*, defaults to `True`): `False` gives the rows in order, source after source.
        reader (`Callable`, *optional*): Makes a `Row` of the columns: `read_row`, or `read_images` where only
            the pictures count.
    """

    def __init__(
        self,
        sources: list[Source],
        transform: Callable[[Row, random.Random], Any],
        num_samples: int | None = None,
        seed: int = 0,
        max_bad_rows: int = 100,
        shuffle: bool = True,
        reader: Callable[..., Row] = read_row,
    ):
        for source in sources:
            if not len(source.rows):
                raise ValueError(f"{source.name} has no rows")
        if shuffle == (num_samples is None):
            raise ValueError("num_samples belongs to a shuffled mixture, and to no other")
        self.sources = sources
        self.transform = transform
        self.num_samples = sum(len(source.rows) for source in sources) if num_samples is None else num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.reader = reader
        self._schedule, self._rank, self._counts = make_block([source.ratio for source in sources], seed)
        self._orders = {}  # source: (pass, order of its rows)
        self._bad_rows = BadRows(max_bad_rows)
        for source in sources:
            first = range(min(max_bad_rows + 1, len(source.rows)))
            check_first_rows(source.name, (functools.partial(self._sample, source, row) for row in first))

    def __len__(self) -> int:
        return self.num_samples

    @property
    def epoch_length(self) -> int:
        """Samples in which every row of every source comes at least once."""
        lengths = []
        for number, source in enumerate(self.sources):
            blocks, rest = divmod(len(source.rows) - 1, int(self._counts[number]))
            last = np.flatnonzero(self._schedule == number)[rest]
            lengths.append(blocks * BLOCK + int(last) + 1)
        return max(lengths)

    @property
    def bad_rows(self) -> int:
        """Rows skipped so far."""
        return self._bad_rows.count

    def __getitem__(self, index: int) -> Any:
        number, row = self.locate(index)
        source = self.sources[number]
        draw = random.Random(f"{self.seed}/{index}")
        for _ in self._bad_rows.attempts(source.name):
            try:
                return self._sample(source, row, draw)
            except BadRow as error:
                self._bad_rows.add(f"row {source.number(row)} of {source.name}", error)
            row = draw.randrange(len(source.rows))

    def _sample(self, source, row, draw):
        return self.transform(self.reader(source.rows[row], draw, source.folder, source.task), draw)

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the source and of its row that sample `index` is made of."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"expected a sample in 0..{self.num_samples - 1}, got {index}")
        if not self.shuffle:
            for number, source in enumerate(self.sources):
                if index < len(source.rows):
                    return number, index
                index -= len(source.rows)
        block, place = divmod(index, BLOCK)
        number = int(self._schedule[place])
        passes, place = divmod(
            block * int(self._counts[number]) + int(self._rank[place]), len(self.sources[number].rows)
        )
        return number, int(self._order(number, passes)[place])

    def _order(self, number, passes):
        if self._orders.get(number, (None,))[0] != passes:
            rows = len(self.sources[number].rows)
            order = np.arange(rows, dtype=np.uint32 if rows < 2**32 else np.uint64)
            np.random.default_rng([self.seed, number, passes]).shuffle(order)  # in place: 4 bytes a row
            self._orders[number] = passes, order
        return self._orders[number][1]


def make_block(ratios: Sequence[float], seed: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources of a block of samples (BLOCK,), which of its source's samples each is, and how many each source has."""
    quotas = np.array(ratios) / sum(ratios) * BLOCK
    counts = np.floor(quotas).astype(int)
    counts[np.argsort(counts - quotas, kind="stable")[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(f"a source's ratio must be at least 1/{BLOCK} of all, got {list(ratios)}")
    schedule = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(ratios)), counts))
    rank = np.empty(BLOCK, dtype=int)
    for number in range(len(ratios)):
        places = np.flatnonzero(schedule == number)
        rank[places] = np.arange(len(places))
    return schedule.astype(np.uint16), rank, counts
