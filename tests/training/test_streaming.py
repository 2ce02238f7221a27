"""Streams: rows divided between readers, ratios, passes, resume, and ends that must not hang."""

import json
import logging
from collections import Counter

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from tar_hf.training.mixture import TooManyBadRows
from tar_hf.training.recipe import DataRecipe, Recipe, RecipeError, SourceRecipe, load_recipe
from tar_hf.training.rows import BadRow
from tar_hf.training.streaming import open_stream
from tar_hf.training.trainer import TarTrainer, open_data, run, training_arguments


def reader(raw, draw, folder, task):
    if raw.get("bad"):
        raise BadRow("spoilt")
    return raw


def transform(raw, draw):
    return raw["id"]


def drawing(raw, draw):
    return raw["id"], draw.random()


def write(file, ids, bad=()):
    file.write_text("".join(json.dumps({"id": i, "bad": i in bad}) + "\n" for i in ids))
    return str(file)


@pytest.fixture
def files(tmp_path):
    """A pattern of files with 24 rows in all, of several sizes."""
    for number, ids in enumerate((range(0, 8), range(8, 11), range(11, 19), range(19, 24))):
        write(tmp_path / f"part{number}.jsonl", ids)
    return str(tmp_path / "part*.jsonl")


@pytest.fixture
def one_file(tmp_path):
    return write(tmp_path / "rows.jsonl", range(24))


def stream(*paths, transform=transform, seed=0, loading=None, buffer=8, **options):
    sources = [path if isinstance(path, SourceRecipe) else SourceRecipe(path) for path in paths]
    data = DataRecipe(sources=sources, streaming=True, shuffle_buffer=buffer, **options)
    return open_stream(data, transform, reader, seed, **(loading or {}))


def take(samples, number):
    samples = iter(samples)
    return [next(samples) for _ in range(number)]


def loaders(*paths, processes=1, workers=0, batch_size=2, **options):
    """The DataLoader of each process, as Trainer has accelerate make them."""
    for process in range(processes):
        loading = {"batch_size": batch_size, "process_index": process, "num_processes": processes}
        loader = DataLoader(
            stream(*paths, loading=loading, **options), batch_size, num_workers=workers, collate_fn=list
        )
        yield prepare_data_loader(
            loader, num_processes=processes, process_index=process, dispatch_batches=False, put_on_device=False
        )


def test_passes_hold_every_row_once(files, one_file):
    for path in (files, one_file):
        taken = take(stream(path), 72)
        passes = [taken[i : i + 24] for i in (0, 24, 48)]
        assert all(sorted(rows) == list(range(24)) for rows in passes)
        assert passes[0] != passes[1] != list(range(24)) != passes[0]
    assert take(stream(one_file, buffer=1), 30) == [*range(24), *range(6)]


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (2, 2)])
def test_readers_share_the_rows_of_a_file(one_file, processes, workers):
    """No row is lost or doubled: every reader has the same number of rows, and none that another one has."""
    shares = loaders(one_file, processes=processes, workers=workers, batch_size=1)
    taken = [row for share in shares for (row,) in take(share, 24 // processes)]
    assert sorted(taken) == list(range(24))


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (4, 0), (1, 2)])
def test_readers_share_the_files(files, processes, workers):
    """Where there are as many files as readers, each file is one reader's, in every pass."""
    for number in range(2):
        shares = []
        for process in range(processes):
            for worker in range(max(1, workers)):
                samples = stream(files, loading={"process_index": process, "num_processes": processes})
                share = samples._share(0, number, process * max(1, workers) + worker, processes * max(1, workers))
                shares.append([json.loads(row["json"])["id"] for _, row in share])
        assert sorted(row for share in shares for row in share) == list(range(24))
        assert all(shares)


@pytest.mark.parametrize("readers", [2, 3])
def test_readers_share_what_does_not_divide(tmp_path, readers):
    """Of 4 or 5 equal files: no reader has more than one row more than another, so that all rows come as often."""
    for count in (4, 5):
        for number in range(count):
            write(tmp_path / f"{count}-{number}.jsonl", range(number * 6, number * 6 + 6))
        samples = stream(str(tmp_path / f"{count}-*.jsonl"))
        for passes in range(2):
            shares = [
                [json.loads(row["json"])["id"] for _, row in samples._share(0, passes, i, readers)]
                for i in range(readers)
            ]
            assert sorted(row for share in shares for row in share) == list(range(count * 6))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_exact_ratios_and_draws_of_their_own(files, tmp_path):
    other = write(tmp_path / "other.jsonl", range(100, 103))
    samples = stream(SourceRecipe(files, ratio=3), SourceRecipe(other), transform=drawing)
    taken = take(samples, 4096)
    assert sum(row >= 100 for row, _ in taken) == 1024
    assert set(Counter(row for row, _ in taken[:1000]).keys()) == {*range(24), *range(100, 103)}
    assert len({draw for _, draw in taken}) == 4096
    assert take(samples, 100) == taken[:100]
    assert take(stream(SourceRecipe(files, ratio=3), SourceRecipe(other), seed=1), 50) != [row for row, _ in taken[:50]]


def test_resume_goes_on_with_the_next_batch(files):
    """As Trainer does it: the batches that were used are read and left."""
    for processes, workers in ((2, 0), (1, 2)):
        whole = [take(loader, 12) for loader in loaders(files, processes=processes, workers=workers)]
        for process, loader in enumerate(loaders(files, processes=processes, workers=workers)):
            assert take(skip_first_batches(loader, 5), 7) == whole[process][5:]


def test_limits(one_file):
    for readers in (1, 2):
        taken = [
            take(loader, 5)
            for loader in loaders(SourceRecipe(one_file, limit="first:10"), processes=readers, batch_size=1)
        ]
        assert {row for share in taken for (row,) in share} <= set(range(10))
    assert sorted(take(stream(SourceRecipe(one_file, limit="first:10")), 10)) == list(range(10))
    for limit in ("end:3", "random:3", "first:50%"):
        with pytest.raises(RecipeError, match=f"can be limited to first:N only, got '{limit}'"):
            stream(SourceRecipe(one_file, limit=limit))
    with pytest.raises(RecipeError, match="has 24 rows, so limit first:25 cannot be kept"):
        take(stream(SourceRecipe(one_file, limit="first:25")), 25)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows(tmp_path, caplog, workers):
    path = write(tmp_path / "rows.jsonl", range(24), bad=(3, 8))
    samples = stream(path)
    batches = iter(DataLoader(samples, 2, num_workers=workers, collate_fn=list))
    with caplog.at_level(logging.WARNING, "tar_hf.training.mixture"):
        taken = [row for batch in take(batches, 33) for row in batch]
    assert set(taken) == set(range(24)) - {3, 8} and samples.bad_rows == 2
    if not workers:
        expected = {f"skipped row {row} of file 0 of {path}: spoilt" for row in (3, 8)}
        assert {record.message for record in caplog.records} == expected

    message = "2 rows could not be read, more than max_bad_rows=1; the last was row [38] of file 0 of .*: spoilt"
    batches = iter(DataLoader(stream(path, max_bad_rows=1), 2, num_workers=workers, collate_fn=list))
    with pytest.raises(TooManyBadRows, match=message):
        take(batches, 33)
    if workers:
        batches._shutdown_workers()  # collected with the traceback, they would be waited for


def test_no_end_without_an_error(tmp_path, one_file):
    """Fewer rows than readers, bad rows alone, no rows at all: an error, and no wait for what cannot come."""
    samples = stream(write(tmp_path / "bad.jsonl", range(3)))
    write(tmp_path / "bad.jsonl", range(3), bad=range(3))  # after the first rows were looked at
    with pytest.raises(TooManyBadRows, match="101 rows of .*bad.jsonl in a row could not be read"):
        take(samples, 1)
    few = write(tmp_path / "few.jsonl", range(3))
    loading = {"process_index": 1, "num_processes": 2, "batch_size": 2}
    batches = iter(DataLoader(stream(one_file, few, loading=loading), 2, num_workers=2, collate_fn=list))
    with pytest.raises(RecipeError, match=r"few.jsonl has no rows for reader 3 of 4 \(workers of all processes\)"):
        take(batches, 40)
    batches._shutdown_workers()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(RecipeError, match="empty.jsonl has no rows"):
        take(stream(str(empty)), 1)


def test_a_source_of_bad_rows_alone_is_refused_at_once(one_file, tmp_path, caplog):
    bad = write(tmp_path / "bad.jsonl", range(24), bad=range(20))
    with pytest.raises(RecipeError, match=r"bad.jsonl: none of its first 6 rows can be used, .* because spoilt$"):
        stream(one_file, bad, max_bad_rows=5)
    assert not caplog.records
    assert stream(one_file, bad, max_bad_rows=20).bad_rows == 0


def test_wrong_streams(one_file):
    with pytest.raises(RecipeError, match="shuffle_buffer must be at least 1"):
        stream(one_file, buffer=0)
    with pytest.raises(ValueError, match="needs a ratio above 0"):
        stream(SourceRecipe(one_file, ratio=0))
    with pytest.raises(ValueError, match="at least 1/4096"):
        stream(one_file, SourceRecipe(one_file, ratio=1e-9))
    with pytest.raises(FileNotFoundError):
        stream("none.jsonl")


def test_training_on_streams(one_file, tmp_path):
    def open_training(**training):
        content = {
            "output_dir": str(tmp_path / "out"),
            "data": {"sources": [{"path": one_file}], "streaming": True, "eval_sources": [{"path": one_file}]},
            "training": {"use_cpu": True, "per_device_train_batch_size": 3, **training},
        }
        recipe = load_recipe(Recipe, content)
        return open_data(recipe.data, training_arguments(recipe), transform, reader)

    train, held_out = open_training(max_steps=5)
    assert isinstance(train, torch.utils.data.IterableDataset) and train.batch_size == 3
    assert [held_out[i] for i in range(len(held_out))] == list(range(24))
    with pytest.raises(RecipeError, match="streaming needs training.max_steps"):
        open_training()
    for option in ({"auto_find_batch_size": True}, {"accelerator_config": {"split_batches": True}}):
        with pytest.raises(RecipeError, match="goes with none of"):
            open_training(max_steps=5, **option)


class Scale(torch.nn.Module):
    """One weight, whose loss tells which rows came."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, rows):
        return {"loss": ((rows - self.weight) ** 2).mean()}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_with_the_rows_that_follow(files, tmp_path, workers):
    def train(output, *callbacks):
        content = {
            "output_dir": str(tmp_path / output),
            "data": {"sources": [{"path": files}], "streaming": True, "shuffle_buffer": 8},
            "training": {
                **{"max_steps": 8, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 3},
                **{"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": workers},
            },
        }
        recipe = load_recipe(Recipe, content)
        arguments = training_arguments(recipe)
        rows, _ = open_data(recipe.data, arguments, transform, reader)
        trainer = TarTrainer(
            Scale(),
            arguments,
            train_dataset=rows,
            data_collator=lambda ids: {"rows": torch.tensor(ids, dtype=torch.float32)},
            callbacks=list(callbacks),
        )
        run(trainer)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = train("whole")
    assert len(set(whole)) == 8
    with pytest.raises(KeyboardInterrupt):
        train("stopped", Stop())
    assert train("stopped") == whole
