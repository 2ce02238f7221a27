"""Every place that rows come from, read alike memory-mapped and as a stream."""

import io
import json
import random

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tar_hf.training.mixture import Mixture
from tar_hf.training.pretokenize import pretokenize
from tar_hf.training.recipe import DataRecipe, RecipeError, SourceRecipe, load_recipe
from tar_hf.training.rows import BadRow, open_image, read_images, read_row, stored_images
from tar_hf.training.sources import arrow_row, load, open_source, plain_row
from tar_hf.training.streaming import open_stream

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shades(source):
    """What the pictures of a source show, in the order of its rows."""
    return [shade(source.rows[i], source.folder) for i in range(len(source.rows))]


def shade(raw, folder):
    return [open_image(image).getpixel((0, 0))[0] for image in read_images(raw, random.Random(0), folder).images]


def streamed_source(recipe):
    return load(recipe, streaming=True)


def streamed(path, **options):
    stream, folder = streamed_source(SourceRecipe(str(path), **options))
    tables = stream.with_format("arrow").iter(batch_size=2)
    return [plain_row(arrow_row(table.slice(i, 1))) for table in tables for i in range(len(table))], folder


@pytest.fixture
def pictures(tmp_path):
    """A folder with three pictures, the second of which in a folder called test."""
    folder = tmp_path / "pictures"
    (folder / "test").mkdir(parents=True)
    for name, value in (("0.png", 10), ("test/1.png", 11), ("2.png", 12)):
        (folder / name).write_bytes(png(value))
    return folder


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


LLAVA = [
    {"id": "a", "image": "0.png", "conversations": TALK},
    {"id": 2, "image": ["test/1.png", "2.png"], "conversations": json.dumps(TALK)},
    {"id": "c", "conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hüllo!"}]},
]


def test_json_and_json_lines(pictures, tmp_path):
    """Rows of several types in a column, paths beside the file or in another folder."""
    write_lines(pictures / "rows.jsonl", LLAVA)
    (tmp_path / "rows.json").write_text(json.dumps(LLAVA))
    for file, folder in ((pictures / "rows.jsonl", None), (tmp_path / "rows.json", str(pictures))):
        source = open_source(SourceRecipe(str(file), image_folder=folder))
        assert [source.rows[i] for i in range(3)] == LLAVA
        assert source.folder == str(pictures) and source.name == str(file)
        assert [shade(row, source.folder) for row in LLAVA[:2]] == [[10], [11, 12]]
        assert streamed(file, image_folder=folder) == (LLAVA, str(pictures))


def test_a_broken_line_is_a_bad_row(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n\n{"text": \n\xff\xfe\n[1]\n')
    rows = open_source(SourceRecipe(str(tmp_path / "rows.jsonl"))).rows
    assert len(rows) == 4 and rows[0] == {"text": "a"}
    for number, message in ((1, "not JSON"), (2, "not JSON"), (3, "must hold an object, got a list")):
        with pytest.raises(BadRow, match=message):
            rows[number]


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    for rows in ([{"text": "a"}], [{"text": "b"}, {"text": "c"}]):
        write_lines(file, rows)
        assert [dict(row) for row in open_source(SourceRecipe(str(file))).rows] == rows


def test_parquet_with_pictures_in_it(pictures, tmp_path):
    """Columns of the Image feature and lists of it, as bytes or as paths, come undecoded."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    stored = [{"bytes": png(20), "path": None}, {"bytes": None, "path": "test/1.png"}]
    single = pa.table({"image": stored, "text": ["x", "y"]}, features.arrow_schema)
    several = datasets.Features({"image": datasets.List(datasets.Image()), "text": datasets.Value("string")})
    lists = pa.table({"image": [stored, []], "text": ["x", "y"]}, several.arrow_schema)
    for name, table, expected in (("one", single, [[20], [11]]), ("lists", lists, [[20, 11]])):
        file = pictures / f"{name}.parquet"
        pq.write_table(table, file)
        source = open_source(SourceRecipe(str(file), task="t2i"))
        rows, folder = streamed(file)
        for i, values in enumerate(expected):
            assert shade(source.rows[i], source.folder) == shade(rows[i], folder) == values
        assert isinstance(source.rows[0]["image"], dict | list)


def test_conversations_in_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"image": [png(1)], "conversations": TALK}]), tmp_path / "a.parquet")
    source = open_source(SourceRecipe(str(tmp_path)))
    row = read_row(source.rows[0], random.Random(0))
    assert row.turns == [("user", TALK[0]["value"]), ("assistant", TALK[1]["value"])]


def test_numbers_of_images_stay_arrays(tmp_path):
    kinds = {"codes_scale1": pa.int32(), "latents": pa.float16()}
    schema = pa.schema([(name, pa.list_(pa.list_(kind))) for name, kind in kinds.items()])
    rows = [{"codes_scale1": [[1, 2], [3]], "latents": [np.array([0.5], np.float16)] * 2}, {}, {"codes_scale1": [None]}]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    source = open_source(SourceRecipe(str(tmp_path)))
    row = source.rows[0]
    assert [codes.dtype for codes in row["codes_scale1"]] == [np.int32] * 2
    assert [codes.tolist() for codes in row["codes_scale1"]] == [[1, 2], [3]]
    assert row["latents"][1].dtype == np.float16 and row["latents"][1].tolist() == [0.5]
    assert source.rows[1] == {"codes_scale1": None, "latents": None}
    with pytest.raises(BadRow, match="whole numbers"):
        read_images(source.rows[2], random.Random(0))


def test_folders_of_pictures(pictures):
    """By themselves, with `metadata.csv` and with `metadata.jsonl`; a folder called test is nothing special."""
    source = open_source(SourceRecipe(str(pictures)))
    assert sorted(shades(source)) == [[10], [11], [12]]
    assert sorted(shade(row, None) for row in streamed(pictures)[0]) == [[10], [11], [12]]

    (pictures / "metadata.csv").write_text('file_name,text\n2.png,two\ntest/1.png,"one, or so"\n')
    source = open_source(SourceRecipe(str(pictures), task="t2i"))
    assert {source.rows[i]["text"]: shades(source)[i] for i in range(2)} == {"two": [12], "one, or so": [11]}
    assert [row["text"] for row in streamed(pictures)[0]] == ["two", "one, or so"]

    (pictures / "metadata.csv").unlink()
    write_lines(pictures / "metadata.jsonl", [{"file_name": "0.png", "conversations": TALK}])
    source = open_source(SourceRecipe(str(pictures)))
    assert shades(source) == [[10]] and len(read_row(source.rows[0], random.Random(0)).turns) == 2


def test_folders_that_datasets_saved(tmp_path):
    saved = datasets.Dataset.from_dict({"image": [{"bytes": png(7), "path": None}], "text": ["x"]})
    saved = saved.cast_column("image", datasets.Image())
    saved.save_to_disk(tmp_path / "saved")
    source = open_source(SourceRecipe(str(tmp_path / "saved"), task="t2i"))
    rows, folder = streamed(tmp_path / "saved")
    assert shades(source) == [shade(rows[0], folder)] == [[7]]


def test_patterns_and_folders_of_files(tmp_path):
    for i, texts in enumerate(([], ["0"], ["1"])):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / f"part{i}.parquet")
    write_lines(tmp_path / "part.bad.jsonl", [{"reason": "none"}])
    for path in (tmp_path, tmp_path / "part?.parquet"):
        rows = open_source(SourceRecipe(str(path))).rows
        assert [rows[i]["text"] for i in range(len(rows))] == ["0", "1"]


def test_a_pattern_over_several_folders_has_no_folder_of_its_own(ta_tok_repo, tmp_path):
    """The picture of one would be taken for that of another: both are called 0.png."""
    for name, shade_of_red in (("a", 10), ("b", 11)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(shade_of_red))
        write_lines(tmp_path / name / "rows.jsonl", [{"image": "0.png"}])
    pattern = str(tmp_path / "*" / "rows.jsonl")
    message = r"rows.jsonl finds files in 2 folders, such as .*a and .*b, and a row .* 0.png: say with image_folder"
    arguments = (DataRecipe([SourceRecipe(pattern)]), lambda row, draw: row)
    with pytest.raises(RecipeError, match=message):
        open_stream(*arguments, reader=read_images)
    with pytest.raises(RecipeError, match=message):  # at the start
        Mixture([open_source(SourceRecipe(pattern))], arguments[1], 1, reader=read_images)
    with pytest.raises(RecipeError, match=message):
        pretokenize(SourceRecipe(pattern), tmp_path / "codes", ta_tok=ta_tok_repo(), device="cpu")
    assert shades(open_source(SourceRecipe(pattern, image_folder=str(tmp_path / "b")))) == [[11], [11]]
    assert shades(open_source(SourceRecipe(str(tmp_path / "[b]" / "*.jsonl")))) == [[11]]


def test_a_pattern_over_several_folders_needs_none_for_other_rows(tmp_path, monkeypatch):
    (tmp_path / "there.png").write_bytes(png(12))
    rows = {"a": [{"image": [png(10)]}], "b": [{"image": [png(11)]}, {"text": "alone"}, {"image": [b""], "text": "x"}]}
    for name, table in rows.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(table), tmp_path / name / "part.parquet")
        write_lines(tmp_path / name / "rows.jsonl", [{"image": str(tmp_path / "there.png")}])
    source = open_source(SourceRecipe(str(tmp_path / "*" / "part.parquet")))
    assert [shade(source.rows[i], source.folder) for i in range(2)] == [[10], [11]]
    assert stored_images(source.rows[2], source.folder) == []
    with pytest.raises(BadRow, match="image must be a path"):
        stored_images(source.rows[3], source.folder)
    assert shades(open_source(SourceRecipe(str(tmp_path / "*" / "rows.jsonl")))) == [[12], [12]]


def test_a_folder_drops_no_files(tmp_path):
    """All are read, or none; what pre-tokenisation wrote about its rows is none of them."""
    write_lines(tmp_path / "a.jsonl", [{"text": "0"}])
    (tmp_path / "b.json").write_text(json.dumps([{"text": "1"}, {"text": "2"}]))
    for path in (tmp_path, tmp_path / "*"):
        rows = open_source(SourceRecipe(str(path))).rows
        assert [rows[i]["text"] for i in range(len(rows))] == ["0", "1", "2"]
    pq.write_table(pa.table({"text": ["3"]}), tmp_path / "c.parquet")
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(RecipeError, match="expected files of one kind, .*got .json, .jsonl, .parquet: choose some"):
            open_source(SourceRecipe(str(path)))
    assert len(open_source(SourceRecipe(str(tmp_path / "*.parquet"))).rows) == 1


def test_unfinished_pre_tokenisation(tmp_path):
    (tmp_path / "pretokenize.json").write_text('{"parts": 2}')
    write_lines(tmp_path / "part-00000-of-00002.bad.jsonl", [{"source_row": 3, "reason": "none"}])
    with pytest.raises(RecipeError, match="holds 0 of 2 parts"):
        open_source(SourceRecipe(str(tmp_path)))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "part-00000-of-00002.parquet")
    for path in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(RecipeError, match="holds 1 of 2 parts"):
            open_source(SourceRecipe(str(path)))
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "part-00001-of-00002.parquet")
    assert len(open_source(SourceRecipe(str(tmp_path))).rows) == 2


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    file = tmp_path_factory.mktemp("ten") / "rows.jsonl"
    write_lines(file, [{"text": str(i)} for i in range(10)])
    return str(file)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("first:3", [0, 1, 2]),
        ("end:3", [7, 8, 9]),
        ("first:10", range(10)),
        ("first:25%", [0, 1, 2]),  # rounded up, as in the original
        ("end:100%", range(10)),
        ("end:1%", [9]),
    ],
)
def test_limits(ten, limit, expected):
    rows = open_source(SourceRecipe(ten, limit=limit)).rows
    assert [int(row["text"]) for row in rows] == list(expected)


@pytest.mark.parametrize("limit", [None, "first:4", "end:3", "random:5"])
def test_numbers_are_those_of_the_whole_source(ten, limit):
    source = open_source(SourceRecipe(ten, limit=limit), 3)
    assert [int(row["text"]) for row in source.rows] == [source.number(row) for row in range(len(source.rows))]


def test_a_folder_with_brackets_is_no_pattern(tmp_path):
    for name in ("rows[1]", "rows1"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"text": [name]}), tmp_path / name / "part.parquet")
    for name in ("rows[1]", "rows1"):
        assert [row["text"] for row in open_source(SourceRecipe(str(tmp_path / name))).rows] == [name]


def test_random_limits(ten):
    def drawn(limit, seed):
        return [int(row["text"]) for row in open_source(SourceRecipe(ten, limit=limit), seed).rows]

    assert drawn("random:5", 1) == drawn("random:5", 1) == drawn("random:50%", 1) != drawn("random:5", 2)
    assert len(set(drawn("random:5", 1))) == 5


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("first:11", "has 10 rows, so limit first:11 cannot be kept"),
        ("first:101%", "cannot be kept"),
        ("first:0", "limit must be"),
        ("first", "limit must be"),
        ("last:3", "limit must be"),
        ("first:-3", "limit must be"),
        ("first:²", "limit must be"),
    ],
)
def test_wrong_limits(ten, limit, message):
    with pytest.raises(RecipeError, match=message):
        open_source(SourceRecipe(ten, limit=limit))


def test_places_without_rows(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "empty.json").write_text("[]")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("empty", "holds no parquet"),
        ("none*.parquet", "holds no parquet"),
        ("none.json", "is neither a file nor a folder"),
        ("no/such/folder", "is neither a file nor a folder"),
        ("folder/none.jsonl", "is neither a file nor a folder"),  # no id on the Hub
    ):
        with pytest.raises(FileNotFoundError, match=message):
            open_source(SourceRecipe(name))
    for name in ("empty.jsonl", "empty.json", "empty.parquet"):
        with pytest.raises(RecipeError, match=f"{name} has no rows"):
            open_source(SourceRecipe(str(tmp_path / name)))


def test_places_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "text.csv").write_text("a,b")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("text.json", "text.json is not JSON"),
        ("object.json", "must hold a list of rows, got a dict"),
        ("text.parquet", "text.parquet cannot be read: .*Parquet magic bytes"),
        ("text.csv", "expected files of one kind, parquet or JSON, got .csv"),
        ("text.*", "expected files of one kind, parquet or JSON, got .csv, .json, .parquet"),
        ("nobody/nothing", "nobody/nothing cannot be read: .*Hub"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            open_source(SourceRecipe(name))
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="task must be one of t2i, i2t, both, got 'draw'"):
        open_source(SourceRecipe("object.json", task="draw"))


def test_mixture_files(ten, tmp_path):
    """Paths start from the file; wrong ones are one line."""
    write_lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    file = tmp_path / "mixture.yaml"
    file.write_text("sources:\n- {path: rows.jsonl, ratio: 2, limit: 'first:1'}\n- {path: " + ten + "}\n")
    data = load_recipe(DataRecipe, {"mixture": str(file)})
    assert [len(open_source(source).rows) for source in data.sources] == [1, 10]
    for text, message in (
        ("sources: [", "is not YAML"),
        ("a: 1", "must hold the one key sources"),
        ("sources: 3", "sources must be a list"),
        ("sources: []", "at least one source"),
        ("sources: [{path: a, ration: 2}]", "unknown key .*ration, did you mean ratio"),
        ("sources: [{ratio: 2}]", "path is missing"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(DataRecipe, {"mixture": str(file)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "is no Hub data set: leave out split 'test'"),
        ({"image_folder": "elsewhere"}, "is a folder of pictures, which needs no image_folder"),
    ],
)
def test_options_that_a_folder_of_pictures_has_no_use_for(pictures, options, message):
    with pytest.raises(RecipeError, match=message):
        open_source(SourceRecipe(str(pictures), **options))
