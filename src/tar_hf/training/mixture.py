"""Weighted mixtures of sources as one data set of a fixed length, which any process can read at any place.

Everything that is drawn for sample n depends on the seed and on n alone: the source, the row, and what a row leaves
open. So ranks and workers share the samples without talking to each other, and a resumed run goes on with the next one.
"""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import multiprocessing

from tar_hf.training.rows import BadRow, Row, read_row

logger = logging.getLogger(__name__)

BLOCK = 4096  # samples in which the ratios are kept exactly, up to rounding


class TooManyBadRows(RuntimeError):
    """More rows than allowed could not be read."""


@dataclass
class Source:
    """
    Args:
        name (`str`): What log lines call it.
        rows (`Sequence[dict]`): The rows' columns, such as `tar_hf.training.sources.open_source` gives them.
        ratio (`float`): Share in the mixture, relative to the others'.
        folder (`str`, *optional*): What relative picture paths start from.
        task (`str`, *optional*): For rows of a picture and a caption.
    """

    name: str
    rows: Sequence[dict]
    ratio: float = 1.0
    folder: str | None = None
    task: str | None = None


class Mixture(torch.utils.data.Dataset):
    """
    Samples of several sources in proportion, each source shuffled anew on every pass through it.

    Args:
        sources (`list[Source]`): What to draw from.
        transform (`Callable[[Row, random.Random], Any]`): Makes an example of a row. The second argument is for its
            own draws. A `BadRow` that it raises counts as one of the source.
        num_samples (`int`): Length. Without shuffling, by default each row once.
        seed (`int`, *optional*, defaults to `0`): Of everything drawn.
        max_bad_rows (`int`, *optional*, defaults to `100`): Rows that may be skipped, counted over the workers of this
            process. Each is logged and another row of the same source takes its place.
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
            if not source.ratio > 0:
                raise ValueError(f"{source.name} needs a ratio above 0, got {source.ratio}: leave it out instead")
        if shuffle == (num_samples is None):
            raise ValueError("num_samples belongs to a shuffled mixture, and to no other")
        self.sources = sources
        self.transform = transform
        self.num_samples = sum(len(source.rows) for source in sources) if num_samples is None else num_samples
        self.seed = seed
        self.max_bad_rows = max_bad_rows
        self.shuffle = shuffle
        self.reader = reader
        self._schedule, self._rank, self._counts = _block(np.array([source.ratio for source in sources]), seed)
        self._orders = {}  # source: (pass, order of its rows)
        self._bad_rows = multiprocessing.Value("l", 0)  # one for all workers

    def __len__(self) -> int:
        return self.num_samples

    @property
    def epoch_length(self) -> int:
        """Samples in which every row of every source comes at least once."""
        shares = self._counts / BLOCK
        return max(int(np.ceil(len(s.rows) / share)) for s, share in zip(self.sources, shares, strict=True))

    @property
    def bad_rows(self) -> int:
        """Rows skipped so far."""
        return self._bad_rows.value

    def __getitem__(self, index: int) -> Any:
        number, row = self.locate(index)
        source = self.sources[number]
        draw = random.Random(f"{self.seed}/{index}")
        while True:
            try:
                return self.transform(self.reader(source.rows[row], draw, source.folder, source.task), draw)
            except BadRow as error:
                self._count(source, row, error)
            row = draw.randrange(len(source.rows))

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
            order = np.random.default_rng([self.seed, number, passes]).permutation(rows)
            self._orders[number] = passes, order.astype(np.uint32 if rows < 2**32 else np.uint64)
        return self._orders[number][1]

    def _count(self, source, row, error):
        with self._bad_rows.get_lock():
            self._bad_rows.value += 1
            count = self._bad_rows.value
        logger.warning("skipped row %d of %s: %s", row, source.name, error)
        if count > self.max_bad_rows:
            raise TooManyBadRows(
                f"{count} rows could not be read, more than max_bad_rows={self.max_bad_rows}; the last was row {row} "
                f"of {source.name}: {error}"
            ) from error


def _block(ratios, seed):
    """Sources of a block of samples (BLOCK,), which of its source's samples each is, and how many each source has."""
    quotas = ratios / ratios.sum() * BLOCK
    counts = np.floor(quotas).astype(int)
    counts[np.argsort(counts - quotas, kind="stable")[: BLOCK - counts.sum()]] += 1
    if not counts.all():
        raise ValueError(f"a source's ratio must be at least 1/{BLOCK} of all, got {ratios.tolist()}")
    schedule = np.random.default_rng([seed]).permutation(np.repeat(np.arange(len(ratios)), counts))
    rank = np.empty(BLOCK, dtype=int)
    for number in range(len(ratios)):
        places = np.flatnonzero(schedule == number)
        rank[places] = np.arange(len(places))
    return schedule.astype(np.uint16), rank, counts
