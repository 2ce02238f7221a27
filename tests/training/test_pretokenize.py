"""Pre-tokenisation: the models' codes, and the same files however often it is killed, on any number of processes."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderDC
from PIL import Image

from tar_hf import ARDeTokForCausalLM, TATokImageProcessor, TATokModel
from tar_hf.training.mixture import TooManyBadRows
from tar_hf.training.models import check_made_with
from tar_hf.training.pretokenize import pretokenize
from tar_hf.training.recipe import DataRecipe, RecipeError, SourceRecipe
from tar_hf.training.rows import open_image, read_images, read_row, square_pixels
from tar_hf.training.sources import open_source
from tar_hf.training.streaming import open_stream

ROWS = 14


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def picture(seed):
    draw = random.Random(seed)
    image = Image.frombytes("RGB", (24 + seed, 20), draw.randbytes((24 + seed) * 20 * 3))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of every kind with 15 pictures in all; two cannot be read."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for i in range(ROWS):
        (folder / f"{i}.png").write_bytes(picture(i))
        lines.append({"id": i, "image": f"{i}.png", "conversations": talk(f"<image>\nWhat is {i}?", "A cat.")})
    lines[2] = {"conversations": talk("Hello.", "Hüllo!")}
    lines[5] |= {"image": ["5.png", "0.png", "1.png"], "conversations": talk("<image><image>", "<image>")}
    lines[6] |= {"conversations_short": talk("<image>?", "Cat.")}
    lines[8] |= {"image": "none.png"}
    lines[9] = {"image": "9.png", "text": "Noise."}
    lines = [json.dumps(line) for line in lines]
    lines[11] = "{"
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def models(ta_tok_repo, ar_detok_repo, diffusion_detok_repo):
    return {"ta_tok": ta_tok_repo(), "ar_detok": ar_detok_repo(), "diffusion_detok": diffusion_detok_repo()}


@pytest.fixture(scope="module")
def run(rows, models):
    """Gives a function that pre-tokenises the rows, four to a file, with any option another."""

    def call(output, **options):
        options = {**models, "batch_size": 3, "rows_per_file": 4, "device": "cpu", **options}
        source = SourceRecipe(**{"path": str(rows), **options.pop("source", {})})
        return pretokenize(source, output, **options)

    return call


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    report = run(folder)
    assert str(report) == "12 rows with 13 images in 4 files, 2 bad rows left out"
    return folder


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_codes_are_those_of_the_models(whole, rows, models):
    ta_tok, processor = (kind.from_pretrained(models["ta_tok"]) for kind in (TATokModel, TATokImageProcessor))
    ta_tok.eval()
    detok = ARDeTokForCausalLM.from_pretrained(models["ar_detok"]).eval()
    vae = AutoencoderDC.from_pretrained(models["diffusion_detok"], subfolder="vae").eval()
    source, written = (
        open_source(SourceRecipe(str(rows), task="t2i")),
        open_source(SourceRecipe(str(whole), task="t2i")),
    )
    numbers = [written.rows[i]["source_row"] for i in range(len(written.rows))]
    assert numbers == [i for i in range(ROWS) if i not in (8, 11)]
    for place, number in enumerate(numbers):
        before = read_row(source.rows[number], random.Random(3), source.folder, "t2i")
        after = read_row(written.rows[place], random.Random(3), written.folder, "t2i")
        assert after.turns == before.turns
        assert after.num_images == before.num_images == len(after.codes) == len(after.vq_ids) == len(after.latents)
        for i, stored in enumerate(before.images):
            image = open_image(stored)
            pixels = processor(image, return_tensors="pt").pixel_values
            assert after.codes[i].keys() == {1, 2, 3}
            for scale, codes in after.codes[i].items():
                assert torch.equal(codes, ta_tok.encode(pixels, scale=scale)[0])
            assert torch.equal(after.vq_ids[i], detok.encode_pixels(square_pixels(image, 64)[None])[0])
            with torch.no_grad():
                latents = vae.encode(square_pixels(image, 32)[None] * 2 - 1).latent * vae.config.scaling_factor
            torch.testing.assert_close(after.latents[i], latents.flatten().half().float(), rtol=0, atol=2e-3)
            assert after.latents[i].shape == (4 * 16 * 16,)
    assert read_row(written.rows[2], random.Random(0)).num_images == 0
    with pytest.raises(ValueError, match="no image"):
        read_images(written.rows[2], random.Random(0))


def test_columns(whole):
    """The same in every file; what a JSON row holds else stays too."""
    tables = [pq.read_table(whole / f"part-{i:05}-of-00004.parquet") for i in range(4)]
    assert all(table.schema.equals(tables[0].schema, check_metadata=True) for table in tables)
    assert tables[0].schema.field("codes_scale2").type == pa.list_(pa.list_(pa.int32()))
    assert tables[0].schema.field("latents").type == pa.list_(pa.list_(pa.float16()))
    merged = pa.concat_tables(tables).to_pylist()
    assert json.loads(merged[0]["other"]) == {"id": 0} and merged[2]["other"] is None
    assert merged[8]["text"] == "Noise." and merged[8]["conversations"] is None
    assert json.loads(merged[6]["conversations_short"]) == talk("<image>?", "Cat.")
    assert "Hüllo" in merged[2]["conversations"]


def test_rows_of_a_limit_have_their_numbers_in_the_whole_source(rows, models, tmp_path):
    source = SourceRecipe(str(rows), task="t2i", limit="end:5")  # 9 .. 13, of which 11 is bad
    pretokenize(source, tmp_path / "out", ta_tok=models["ta_tok"], scales=[3])
    written = open_source(SourceRecipe(str(tmp_path / "out")))
    assert [row["source_row"] for row in written.rows] == [9, 10, 12, 13]
    (file,) = (tmp_path / "out").glob("*.bad.jsonl")
    assert [json.loads(line)["source_row"] for line in file.read_text().splitlines()] == [11]


def test_bad_rows_are_listed(whole):
    bad = [json.loads(line) for file in sorted(whole.glob("*.bad.jsonl")) for line in file.read_text().splitlines()]
    assert [row["source_row"] for row in bad] == [8, 11]
    assert "none.png" in bad[0]["reason"] and "not JSON" in bad[1]["reason"]
    assert [file.name for file in whole.glob("*.bad.jsonl")] == ["part-00002-of-00004.bad.jsonl"]


def test_streams_read_it_too(whole):
    data = DataRecipe(sources=[SourceRecipe(str(whole), task="t2i")])
    stream = iter(open_stream(data, lambda row, draw: row.codes, read_row))
    assert Counter(len(next(stream)) for _ in range(12)) == {0: 1, 1: 10, 3: 1}


@pytest.mark.parametrize("stop", [1, 4, 6, 13])
def test_a_broken_run_goes_on(run, whole, tmp_path, stop):
    def break_off(stage, step, total):
        assert (stage, total) == ("rows", ROWS)
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", callback=break_off)
    assert sum(file.suffix == ".parquet" for file in (tmp_path / "out").iterdir()) == (stop - 1) // 4
    steps = []
    report = run(tmp_path / "out", callback=lambda stage, step, total: steps.append(step))
    assert steps == list(range((stop - 1) // 4 * 4 + 1, ROWS + 1))
    assert report.files == 4 - (stop - 1) // 4 and not report.missing
    assert contents(tmp_path / "out") == contents(whole)
    assert str(run(tmp_path / "out")) == "0 rows with 0 images in 0 files, 0 bad rows left out"


def test_loading_processes(run, whole, tmp_path):
    run(tmp_path / "out", num_workers=2)
    assert contents(tmp_path / "out") == contents(whole)


SCRIPT = """
import os, signal, sys
from tar_hf.training.pretokenize import pretokenize
from tar_hf.training.recipe import SourceRecipe

def report(stage, step, total):
    if step == int(kill):
        os.kill(os.getpid(), signal.SIGKILL)

path, output, kill, *models = sys.argv[1:]
models = dict(zip(("ta_tok", "ar_detok", "diffusion_detok"), models))
report = pretokenize(SourceRecipe(path), output, **models, batch_size=3, rows_per_file=4, device="cpu", callback=report)
print(report)
"""


def command(rows, output, models, kill):
    return ["-c", SCRIPT, str(rows), str(output), str(kill), *map(str, models.values())]


@pytest.mark.slow
def test_a_killed_run_goes_on(run, whole, rows, models, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, *command(rows, tmp_path / "out", models, 10)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert sum(file.suffix == ".parquet" for file in (tmp_path / "out").iterdir()) == 2
    run(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.slow
def test_two_processes_go_on_with_the_work_of_one(whole, rows, models, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("pretokenize.json", "part-00000-of-00004.parquet"):
        shutil.copy(whole / name, tmp_path / "out")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    # What `accelerate launch` calls on several GPUs; on CPUs it starts one process alone.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command(rows, tmp_path / "out", models, -1)[2:]
    made = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert Counter(line.split(" rows")[0] for line in made.stdout.splitlines() if " rows" in line) == {"2": 1, "6": 1}
    assert contents(tmp_path / "out") == contents(whole)


def test_only_what_is_asked_for(run, models, tmp_path):
    none = dict.fromkeys(models)
    run(tmp_path / "vq", **none | {"ar_detok": models["ar_detok"]})
    row = read_images(open_source(SourceRecipe(str(tmp_path / "vq"))).rows[0], random.Random(0))
    assert row.vq_ids and not row.codes and not row.latents
    vqvae = ARDeTokForCausalLM.from_pretrained(models["ar_detok"]).vqvae
    vqvae.save_pretrained(tmp_path / "vqvae")
    run(tmp_path / "alone", **none | {"ar_detok": tmp_path / "vqvae"})
    alone = read_images(open_source(SourceRecipe(str(tmp_path / "alone"))).rows[0], random.Random(0))
    assert torch.equal(alone.vq_ids[0], row.vq_ids[0])
    run(tmp_path / "codes", **none | {"ta_tok": models["ta_tok"]}, scales=[3])
    row = read_images(open_source(SourceRecipe(str(tmp_path / "codes"))).rows[0], random.Random(0))
    assert row.codes[0].keys() == {3}
    run(tmp_path / "latents", **none | {"diffusion_detok": models["diffusion_detok"]}, image_size=16, dtype="bfloat16")
    row = read_images(open_source(SourceRecipe(str(tmp_path / "latents"))).rows[0], random.Random(0))
    assert row.latents[0].shape == (4 * 8 * 8,)
    dc_ae = none | {"diffusion_detok": models["diffusion_detok"] / "vae"}
    run(tmp_path / "dc-ae", **dc_ae, image_size=16, dtype="bfloat16")
    alone = read_images(open_source(SourceRecipe(str(tmp_path / "dc-ae"))).rows[0], random.Random(0))
    assert torch.equal(alone.latents[0], row.latents[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_manifest_knows_the_weights_of_the_files(run, models, tmp_path, dtype):
    """Whatever the models compute in: training, which loads them in float32, takes the rows."""

    def load(kind, name, **options):
        return kind.from_pretrained(models[name], **options)

    run(tmp_path / "out", dtype=dtype)
    own = {
        "codebook_weights": ("ta-tok", lambda: load(TATokModel, "ta_tok").quantizer),
        "vq_weights": ("ar-detok", lambda: load(ARDeTokForCausalLM, "ar_detok").vqvae),
        "vae_weights": ("sana", lambda: load(AutoencoderDC, "diffusion_detok", subfolder="vae")),
    }
    check_made_with(DataRecipe([SourceRecipe(str(tmp_path / "out"))]), own)
    row = read_images(open_source(SourceRecipe(str(tmp_path / "out"))).rows[0], random.Random(0))
    detok = load(ARDeTokForCausalLM, "ar_detok", dtype=dtype).eval()
    assert torch.equal(row.vq_ids[0], detok.encode_pixels(square_pixels(open_image(picture(0)), 64)[None])[0])


def test_parquet_rows_keep_their_columns(models, tmp_path):
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "conversations": pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})),
            "score": pa.float32(),
            "tags": pa.list_(pa.string()),
        }
    )
    stored = {"bytes": picture(0), "path": None}
    rows = [{"image": stored, "conversations": talk("<image>", "A."), "score": 0.5, "tags": ["a", "b"]}, {"score": 1.0}]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    pretokenize(SourceRecipe(str(tmp_path / "rows.parquet")), tmp_path / "out", ta_tok=models["ta_tok"], scales=[3])
    table = pq.read_table(tmp_path / "out" / "part-00000-of-00001.parquet")
    assert table.schema.names == ["conversations", "score", "tags", "source_row", "codes_scale3"]
    assert table.schema.field("tags").type == pa.list_(pa.string())
    assert table["tags"].to_pylist() == [["a", "b"], None] and table["codes_scale3"].to_pylist()[1] == []
    row = read_row(open_source(SourceRecipe(str(tmp_path / "out"))).rows[0], random.Random(0))
    assert row.turns == [("user", "<image>"), ("assistant", "A.")] and row.codes[0].keys() == {3}
    # What has no pictures any more cannot be done again.
    again = pretokenize(SourceRecipe(str(tmp_path / "out")), tmp_path / "again", ar_detok=models["ar_detok"])
    assert (
        again.bad_rows == 1 and "pre-tokenised already" in (tmp_path / "again").glob("*.jsonl").__next__().read_text()
    )


def test_files_without_a_good_row(models, tmp_path):
    lines = [{"image": "none.png"}] * 2 + [{"text": "a"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = pretokenize(
        SourceRecipe(str(tmp_path / "rows.jsonl")), tmp_path / "out", ar_detok=models["ar_detok"], rows_per_file=2
    )
    assert (report.rows, report.bad_rows, report.files) == (1, 2, 2)
    assert len(open_source(SourceRecipe(str(tmp_path / "out"))).rows) == 1


def test_too_many_bad_rows(run, whole, tmp_path):
    """Counted over all files, also those of an earlier call."""
    with pytest.raises(TooManyBadRows, match="1 rows .* more than max_bad_rows=0; the last was row 8 of .*none.png"):
        run(tmp_path / "out", max_bad_rows=0)
    with pytest.raises(TooManyBadRows, match="2 rows .* more than max_bad_rows=1; the last was row 11 of .*not JSON"):
        run(tmp_path / "one", max_bad_rows=1, rows_per_file=2)
    with pytest.raises(TooManyBadRows, match="2 rows .* more than max_bad_rows=1; the last was row 11 of .*not JSON"):
        run(tmp_path / "one", max_bad_rows=1, rows_per_file=2)
    run(tmp_path / "out", max_bad_rows=2)
    assert contents(tmp_path / "out") == contents(whole)


def test_no_good_row_at_all(models, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "none.png"}\n' * 3)
    for _ in range(2):  # the second call goes on with the first
        with pytest.raises(TooManyBadRows, match="none of the 3 rows could be read; the last was row 2 of .*none.png"):
            pretokenize(
                SourceRecipe(str(tmp_path / "rows.jsonl")),
                tmp_path / "out",
                ar_detok=models["ar_detok"],
                rows_per_file=2,
            )


def test_scales_are_those_of_the_ta_tok(run, models, tmp_path):
    model = TATokModel.from_pretrained(models["ta_tok"])
    TATokImageProcessor.from_pretrained(models["ta_tok"]).save_pretrained(tmp_path / "ta_tok")
    only = dict.fromkeys(models) | {"ta_tok": tmp_path / "ta_tok", "source": {"limit": "first:1"}}
    model.config.scales = [2, 3]
    model.save_pretrained(tmp_path / "ta_tok")
    run(tmp_path / "out", **only)
    row = read_images(open_source(SourceRecipe(str(tmp_path / "out"))).rows[0], random.Random(0))
    assert row.codes[0].keys() == {2, 3}
    model.config.scales = [2, 5]
    model.save_pretrained(tmp_path / "ta_tok")
    with pytest.raises(ValueError, match="rows hold codes of the scales 1, 2 and 3, got 5"):
        run(tmp_path / "five", **only)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"scales": [1, 2]}, r"scales=\[1, 2, 3\], and now it is \[1, 2\]"),
        ({"rows_per_file": 5}, "rows_per_file=4, and now it is 5"),
        ({"dtype": "bfloat16"}, "dtype=None, and now it is 'bfloat16'"),
        ({"image_size": 64}, "image_size=32, and now it is 64"),
        ({"ar_detok": None}, "ar_detok='.*', and now it is None"),
        ({"source": {"limit": "first:9"}}, "limit=None, and now it is 'first:9'"),
    ],
)
def test_other_settings_are_refused(run, whole, options, key):
    before = contents(whole)
    with pytest.raises(RecipeError, match=f"was started with {key}"):
        run(whole, **options)
    assert contents(whole) == before


def test_other_rows_or_weights_are_refused(run, rows, models, tmp_path):
    only = dict.fromkeys(models) | {"ta_tok": tmp_path / "ta_tok", "scales": [3]}
    file = rows.with_name("copy.jsonl")
    file.write_text(rows.read_text())
    model = TATokModel.from_pretrained(models["ta_tok"])
    model.save_pretrained(tmp_path / "ta_tok")
    TATokImageProcessor.from_pretrained(models["ta_tok"]).save_pretrained(tmp_path / "ta_tok")
    run(tmp_path / "out", source={"path": str(file)}, **only)
    with torch.no_grad():
        model.in_proj.weight += 0.01
    model.save_pretrained(tmp_path / "ta_tok")
    with pytest.raises(RecipeError, match="was started with ta_tok_weights="):
        run(tmp_path / "out", source={"path": str(file)}, **only)
    file.write_text(rows.read_text().replace("cat", "dog"))
    with pytest.raises(RecipeError, match="was started with source_fingerprint="):
        run(tmp_path / "out", source={"path": str(file)}, **only)


def test_wrong_calls(run, models, tmp_path):
    none = dict.fromkeys(models)
    for options, message in (
        (none, "at least one of ta_tok, ar_detok and diffusion_detok"),
        (none | {"ar_detok": models["ar_detok"], "image_size": 64}, "image_size is that of the latents"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rows_per_file": 0}, "rows_per_file must be at least 1"),
        ({"max_bad_rows": -1}, "max_bad_rows must be at least 0"),
        ({"scales": []}, "each scale once"),
        ({"scales": [1, 1]}, "each scale once"),
        ({"scales": [4]}, r"scale must be one of \[1, 2, 3\], got 4"),
        (none | {"diffusion_detok": models["ta_tok"]}, "diffusion_detok .* must be a SanaPipeline or"),
        ({"image_size": 33}, "image_size must be a positive multiple of 2, got 33"),
        (
            none | {"diffusion_detok": models["diffusion_detok"] / "vae"},
            "vae is an autoencoder alone, which takes pictures of any size: give image_size",
        ),
        (none | {"ta_tok": models["ar_detok"]}, "ta_tok .* must hold a model of the type ta_tok, got ar_detok"),
        (
            none | {"ar_detok": models["ta_tok"]},
            "ar_detok .* must hold .* ar_detok or janus_vqgan, got ta_tok",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        run(tmp_path / "out")
    (tmp_path / "out" / "pretokenize.json").write_text("{")
    with pytest.raises(RecipeError, match="is not JSON"):
        run(tmp_path / "out")
