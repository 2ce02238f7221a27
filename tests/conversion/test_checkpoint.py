"""Safe reading of `torch.save` files: what is read, how, and what is refused with which message."""

import datetime
import io
import os
import pickle
import random
import re
import sys
import types
import warnings
import zipfile

import psutil
import pytest
import torch

from tar_hf.conversion.checkpoint import ConversionError, read_checkpoint, read_model_section

TINY = {"model": {"name": "tiny", "args": {"width": 3}, "sd": {"weight": torch.arange(6.0).view(2, 3)}}}


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_records(archive: bytes, change) -> bytes:
    """The zip archive after `change` of the dictionary {record: bytes}."""
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        records = {name: source.read(name) for name in source.namelist()}
    change(records)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, content in records.items():
            target.writestr(name, content)
    return buffer.getvalue()


def with_pickle(change) -> bytes:
    """TINY's archive with `change(pickle)` for its pickle."""
    return with_records(saved(TINY), lambda records: records.update({"archive/data.pkl": change(PICKLE)}))


with zipfile.ZipFile(io.BytesIO(saved(TINY))) as archive:
    PICKLE = archive.read("archive/data.pkl")


@pytest.fixture
def refused(tmp_path):
    """Writes the bytes as source.pth and gives the message with which reading them is refused."""

    def read(content: bytes) -> str:
        path = tmp_path / "source.pth"
        path.write_bytes(content)
        with pytest.raises(ConversionError) as caught:
            read_checkpoint(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message
        return message.replace(str(path), "source.pth")

    return read


def test_reads_tensors_and_plain_values(tmp_path):
    (tmp_path / "tiny.pth").write_bytes(saved(TINY))
    model = read_checkpoint(tmp_path / "tiny.pth")["model"]
    assert model["args"] == {"width": 3}
    assert torch.equal(model["sd"]["weight"], torch.arange(6.0).view(2, 3))


def test_golden_published_easydict_is_read_as_dict(golden, monkeypatch):
    path = golden / "published" / "ta_tok.pth"
    with zipfile.ZipFile(path) as archive:
        assert b"easydict" in archive.read("ta_tok/data.pkl")
    monkeypatch.setitem(sys.modules, "easydict", None)  # reading does not need the package
    args = read_checkpoint(path)["model"]["args"]
    assert type(args) is dict and type(args["bottleneck"]["args"]["regularizer"]["args"]) is dict
    assert args["bottleneck"]["args"]["regularizer"]["args"]["codebook_size"] == 512


def test_only_easydict_is_let_through_of_its_module(refused, monkeypatch):
    module = types.ModuleType("easydict")
    module.Other = type("Other", (dict,), {"__module__": "easydict"})
    monkeypatch.setitem(sys.modules, "easydict", module)
    assert "easydict.Other" in refused(saved({"model": module.Other(a=1)}))


def test_tensors_are_memory_mapped(tmp_path):
    size = 200 * 2**20
    path = tmp_path / "large.pth"
    torch.save({"model": {"weight": torch.arange(size // 8)}}, path)
    process = psutil.Process()
    before = process.memory_info().rss
    weight = read_checkpoint(path)["model"]["weight"]
    assert process.memory_info().rss - before < size / 10
    assert weight.nbytes == size and weight[-1] == size // 8 - 1
    path.unlink()


# Refused: not read at all, nothing of it run


def test_a_call_in_the_pickle_is_not_run(refused, tmp_path):
    marker = tmp_path / "marker"
    content = saved({"model": {"args": Reduced(os.system, f"touch '{marker}'"), "sd": {}}})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert marker.exists(), "the trap must work, or this test shows nothing"
    marker.unlink()
    message = refused(content)
    assert re.search(r"\b(posix|nt|os)\.system\b", message) and "refused" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (datetime.date(2025, 1, 1), "datetime.date"),
        (Reduced(eval, "1"), "builtins.eval"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
def test_any_other_global_is_refused_by_name(refused, value, name):
    message = refused(saved({"model": {"args": value}}))
    assert name.removeprefix("builtins.") in message and "refused" in message


# Refused: not a whole archive


@pytest.mark.parametrize("length", [0, 10, 1000, "half", "all but one byte"])
def test_golden_published_truncated(golden, refused, length):
    content = (golden / "published" / "ar_dtok_64px.pth").read_bytes()
    length = {"half": len(content) // 2, "all but one byte": len(content) - 1}.get(length, length)
    message = refused(content[:length])
    assert f"{length} bytes" in message and "not a whole torch.save zip archive" in message


def test_random_bytes(refused):
    assert "not a whole torch.save zip archive" in refused(random.Random(0).randbytes(5000))


def test_legacy_format(refused):
    buffer = io.BytesIO()
    torch.save(TINY, buffer, _use_new_zipfile_serialization=False)
    assert "not a whole torch.save zip archive" in refused(buffer.getvalue())


def test_zip_of_something_else(refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "damaged" in refused(buffer.getvalue())


def test_zip_behind_other_bytes(refused):
    refused(b"GIF89a" + saved(TINY))


@pytest.mark.parametrize("missing", ["archive/data.pkl", "archive/data/0"])
def test_archive_without_a_record(refused, missing):
    assert "damaged" in refused(with_records(saved(TINY), lambda records: records.pop(missing)))


@pytest.mark.parametrize(
    "change",
    {
        "empty": lambda _: b"",
        "truncated": lambda content: content[:-10],
        "cut inside a number": lambda _: b"\x80\x02J\x01",
        "end without a value": lambda _: b"\x80\x02.",
        "a value without a mark": lambda _: b"\x80\x02t.",
        "unknown opcode": lambda content: content[:2] + b"\xff" + content[3:],
        "noise": lambda content: content[:2] + random.Random(0).randbytes(len(content)),
        "a name that is no text": lambda content: content.replace(b"weight", b"\xff\xfe\xfd\xfc\xfb\xfa"),
    }.items(),
    ids=lambda change: change[0],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickle_is_called_damaged(refused, change):
    """It holds no foreign name that could run: the user must learn to download it again, not to fear it."""
    assert "damaged" in refused(with_pickle(change[1]))


def test_random_damage_is_never_another_exception(tmp_path):
    """Overwrites bytes of the pickle: whatever they make of it is a checkpoint or a ConversionError."""
    generator, path, refusals = random.Random(0), tmp_path / "source.pth", 0
    for _ in range(400):
        damaged = bytearray(PICKLE)
        for position in generator.sample(range(len(PICKLE)), 2):
            damaged[position] = generator.randrange(256)
        path.write_bytes(with_pickle(lambda _, damaged=damaged: bytes(damaged)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_checkpoint(path)
            except ConversionError:
                refusals += 1
    assert refusals > 200


def test_a_checkpoint_that_holds_itself_is_refused(tmp_path):
    checkpoint = {}
    checkpoint["model"] = checkpoint
    torch.save(checkpoint, tmp_path / "source.pth")
    with pytest.raises(ConversionError, match="nested too deeply to be a checkpoint"):
        read_checkpoint(tmp_path / "source.pth")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.pth"))):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_checkpoint(tmp_path)


# The section of the original's models


def test_model_section(tmp_path):
    (tmp_path / "tiny.pth").write_bytes(saved(TINY))
    name, args, tensors = read_model_section(tmp_path / "tiny.pth", "a tiny model")
    assert (name, args, list(tensors)) == ("tiny", {"width": 3}, ["weight"])


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (torch.zeros(2), "a Tensor"),
        ([1, 2], "a list"),
        ({"state_dict": {}, "epoch": 3}, "a dictionary of state_dict, epoch"),
        ({f"layer{i}": torch.zeros(1) for i in range(9)}, "a dictionary of layer0, .*, layer4 and 4 more"),
        # {"model": ...} as such is what was expected: what stands in it is what came.
        ({"model": {"encoder.weight": torch.zeros(1)}}, "encoder.weight"),
        ({"model": torch.zeros(1)}, "a Tensor"),
        ({"model": {"name": "x", "args": {}, "sd": [torch.zeros(1)]}}, "a list"),
    ],
)
def test_model_section_of_another_form(tmp_path, content, got):
    (tmp_path / "source.pth").write_bytes(saved(content))
    with pytest.raises(ConversionError, match=f"source.pth is not a tiny model: expected .*got .*{got}"):
        read_model_section(tmp_path / "source.pth", "a tiny model")


@pytest.mark.parametrize("args", [None, [1]])
def test_model_section_whose_args_are_no_dictionary(tmp_path, args):
    (tmp_path / "source.pth").write_bytes(saved({"model": {"name": "x", "args": args, "sd": {}}}))
    with pytest.raises(ConversionError, match="args"):
        read_model_section(tmp_path / "source.pth", "a tiny model")


@pytest.mark.parametrize("entry", [{"a": 1}, {3: torch.zeros(1)}])
def test_model_section_whose_tensors_are_none(tmp_path, entry):
    (tmp_path / "source.pth").write_bytes(saved({"model": {"name": "x", "args": {}, "sd": entry}}))
    with pytest.raises(ConversionError, match=r"expected tensors by name, got ('a'|3): (int|Tensor)"):
        read_model_section(tmp_path / "source.pth", "a tiny model")
