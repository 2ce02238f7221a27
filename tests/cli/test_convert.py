"""`tar-hf convert`: what it prints, and for every kind of wrong input one line, status 2 and nothing left."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from tar_hf.conversion.checkpoint import read_checkpoint

# Runs each command of a list in one process, for one start of Python: a new one would take seconds a command.
RUNNER = """
import contextlib, json, os, resource, sys, traceback
from tar_hf.cli.main import main

def run(arguments, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code
    except BaseException:  # as the interpreter would
        traceback.print_exc()
        return 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

results = {}
for name, (arguments, limit) in json.load(sys.stdin).items():
    with open("out", "w+") as out, open("err", "w+") as err:
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        status = run(arguments, limit or resource.RLIM_INFINITY)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        out.seek(0), err.seek(0)
        results[name] = status, out.read(), err.read()
print(json.dumps(results))
"""


class Call:
    def __reduce__(self):
        return os.system, ("true",)


def bad_inputs(golden, folder):
    """Name of a case: arguments before and after OUT, part of the message."""
    published, heads = golden / "published", ["--num-attention-heads", "4"]

    def ta_tok(name, change=lambda model: None):
        checkpoint = read_checkpoint(published / "ta_tok.pth")
        change(checkpoint["model"])
        torch.save(checkpoint, folder / f"{name}.pth")
        return ["ta-tok", folder / f"{name}.pth"]

    def write(name, content):
        (folder / name).write_bytes(content)
        return ["ta-tok", folder / name]

    def llm(name, file, content):
        shutil.copytree(published / "llm", folder / name)
        if content is None:
            (folder / name / file).unlink()
        else:
            (folder / name / file).write_text(content)
        return ["llm", folder / name]

    torch.save({}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": Call()}, folder / "call.pth")
    plain = (published / "ta_tok.pth").read_bytes()
    damaged = io.BytesIO()
    with zipfile.ZipFile(published / "ta_tok.pth") as source, zipfile.ZipFile(damaged, "w") as target:
        for record in source.namelist():
            target.writestr(record, b"\x80\x02." if record.endswith("data.pkl") else source.read(record))
    (folder / "not.json").write_text("{")
    (folder / "wrong.json").write_text('{"vision_config": {"hidden_size": "x"}}')
    vqvae = read_checkpoint(published / "vq_ds16.pt")
    no_blocks = {name: tensor for name, tensor in vqvae["model"].items() if "encoder.conv_blocks" not in name}
    torch.save({"model": no_blocks}, folder / "no_blocks.pt")
    vqvae["model"]["quantize.embedding.weight"] = vqvae["model"]["quantize.embedding.weight"][:64].clone()
    torch.save(vqvae, folder / "cut.pt")

    return {
        "no such file": (["ta-tok", folder / "none.pth"], heads, "none.pth"),
        "a folder": (["ta-tok", published], heads, "not a file"),
        "truncated": (write("truncated.pth", plain[: len(plain) // 2]), heads, "not a whole torch.save zip archive"),
        "empty": (write("empty.pth", b""), heads, "not a whole torch.save zip archive"),
        "legacy format": (["ta-tok", folder / "legacy.pth"], heads, "not a whole torch.save zip archive"),
        "a call": (["ta-tok", folder / "call.pth"], heads, "system.*refused"),
        "damaged pickle": (write("damaged.pth", damaged.getvalue()), heads, "damaged"),
        "another checkpoint": (["ta-tok", published / "ar_dtok_64px.pth"], heads, "not a TA-Tok checkpoint"),
        "another checkpoint, ar-detok": (
            ["ar-detok", published / "ta_tok.pth"],
            ["--vqvae", folder / "cut.pt"],
            "not an AR-DTok checkpoint",
        ),
        "no arguments": (ta_tok("no_args", lambda model: model.update(args=None)), heads, "args"),
        "a bottleneck by name": (
            ta_tok("name", lambda model: model["args"].update(bottleneck="x")),
            heads,
            "bottleneck",
        ),
        "misshapen": (
            ta_tok("misshapen", lambda model: model["sd"].update({"bottleneck.in_linear.bias": torch.zeros(7)})),
            heads,
            r"in_linear\.bias.*\(24,\).*\(7,\)",
        ),
        "no matrix": (
            ta_tok(
                "flat", lambda model: model["sd"].update({"bottleneck.regularizer.embedding.weight": torch.zeros(7)})
            ),
            heads,
            r"embedding\.weight.*\(7,\)",
        ),
        "integers": (
            ta_tok("integers", lambda model: model["sd"].update({k: v.to(torch.int8) for k, v in model["sd"].items()})),
            heads,
            "int8",
        ),
        "heads not told": (ta_tok("untold"), [], "--num-attention-heads N"),
        "wrong heads": (ta_tok("heads"), ["--num-attention-heads", "5"], "5 attention heads do not divide"),
        "no configuration": (ta_tok("a"), ["--vision-config", folder / "none.json"], "none.json"),
        "not JSON": (ta_tok("b"), ["--vision-config", folder / "not.json"], "not.json"),
        "wrong configuration": (ta_tok("c"), ["--vision-config", folder / "wrong.json"], "hidden_size"),
        "no such autoencoder": (
            ["ar-detok", published / "ar_dtok_64px.pth"],
            ["--vqvae", folder / "none.pt"],
            "none.pt",
        ),
        "another autoencoder": (
            ["ar-detok", published / "ar_dtok_64px.pth"],
            ["--vqvae", folder / "cut.pt"],
            "128 different tokens.*64",
        ),
        "half an autoencoder": (
            ["ar-detok", published / "ar_dtok_64px.pth"],
            ["--vqvae", folder / "no_blocks.pt"],
            "conv_blocks",
        ),
        "llm, no folder": (["llm", folder / "none"], [], "none"),
        "llm, no weights": (llm("weights", "model.safetensors", None), [], "model.safetensors is not a file"),
        "llm, truncated weights": (llm("cut", "model.safetensors", "xyz"), [], "not a whole safetensors file"),
        "llm, no configuration": (llm("config", "config.json", None), [], "config.json is not a file"),
        "llm, wrong configuration": (
            llm("wrong", "config.json", '{"model_type": "qwen2", "hidden_size": "x"}'),
            [],
            "hidden_size",
        ),
        "llm, wrong index": (llm("index", "model.safetensors.index.json", '{"weight_map": []}'), [], "index.json"),
        "llm, empty tokenizer": (llm("tokenizer", "tokenizer.json", "{}"), [], "tokenizer"),
    }


BAD = [
    *("no such file", "a folder", "truncated", "empty", "legacy format", "a call", "damaged pickle"),
    *("another checkpoint", "another checkpoint, ar-detok", "no arguments", "a bottleneck by name", "misshapen"),
    *("no matrix", "integers", "heads not told", "wrong heads", "no configuration", "not JSON", "wrong configuration"),
    *("no such autoencoder", "another autoencoder", "half an autoencoder", "llm, no folder", "llm, no weights"),
    *("llm, truncated weights", "llm, no configuration", "llm, wrong configuration", "llm, wrong index"),
    "llm, empty tokenizer",
]
FULL_DISK = ["full disk, ta-tok", "full disk, ar-detok", "full disk, llm"]


@pytest.fixture(scope="module")
def ran(golden, tmp_path_factory):
    """By case: exit status, stdout, stderr, the folder that OUT was to be made in, and part of the message."""
    folder, published = tmp_path_factory.mktemp("inputs"), golden / "published"
    heads, vqvae = ["--num-attention-heads", "4"], ["--vqvae", published / "vq_ds16.pt"]
    good = {
        "ta-tok": (["ta-tok", published / "ta_tok.pth"], heads, ""),
        "ar-detok": (["ar-detok", published / "ar_dtok_64px.pth"], vqvae, ""),
        "llm": (["llm", published / "llm_llava_qwen"], ["--base-model", "someone/model"], ""),
    }
    cases = bad_inputs(golden, folder) | good
    cases |= {f"full disk, {kind}": (*case[:2], "large|space|write|I/O") for kind, case in good.items()}
    assert cases.keys() == {*BAD, *FULL_DISK, *good}
    commands, outputs = {}, {}
    for name, (before, after, _) in cases.items():
        outputs[name] = tmp_path_factory.mktemp("output")
        arguments = ["convert", *map(str, before), str(outputs[name] / "repo"), *map(str, after)]
        commands[name] = arguments, 50_000 if name in FULL_DISK else None
    existing = tmp_path_factory.mktemp("existing")
    (existing / "repo").mkdir()
    commands["existing"] = ["convert", *map(str, good["llm"][0]), str(existing / "repo")], None
    outputs["existing"], cases["existing"] = existing, ([], [], "repo exists already")
    process = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("cwd"),
    )
    assert process.returncode == 0, process.stderr
    return {name: (*result, outputs[name], cases[name][2]) for name, result in json.loads(process.stdout).items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_wrong_input(ran, case):
    status, out, err, folder, said = ran[case]
    assert (status, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("tar-hf: error: ") and re.search(said, line)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_DISK)
def test_full_disk(ran, case):
    status, out, err, folder, said = ran[case]
    assert (status, out) == (2, "") and "Traceback" not in err, err
    assert re.search(said, err.splitlines()[-1])
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_existing_output(ran):
    status, out, err, folder, said = ran["existing"]
    assert (status, out) == (2, "") and said in err and len(err.splitlines()) == 1
    assert [path.name for path in folder.rglob("*")] == ["repo"]


@pytest.mark.slow
def test_dropped_tensors_are_listed_with_reasons(ran, golden):
    status, out, _, folder, _ = ran["ta-tok"]
    lines = out.splitlines()
    assert status == 0 and lines[0] == "101 tensors used, 44 dropped"
    assert lines[-1] == f"{golden / 'published' / 'ta_tok.pth'} -> {folder / 'repo'}"
    reasons = {line for line in lines if line.startswith("dropped, ")}
    assert len(reasons) == 5 and all(line.endswith(":") for line in reasons)
    assert sum(line.startswith("  ") for line in lines) == 44
    after = lines[lines.index("dropped, left over from the training:") + 1 :]
    assert after[:2] == ["  teacher.post_layernorm.bias", "  teacher.post_layernorm.weight"]


@pytest.mark.slow
def test_other_conversions(ran):
    status, out, _, folder, _ = ran["ar-detok"]
    assert status == 0 and out.startswith("370 tensors used, 1 dropped\n") and "  vqvae.quantize.codebook_used" in out
    assert len(load_file(folder / "repo" / "model.safetensors")) == 370
    status, out, _, folder, _ = ran["llm"]
    assert status == 0 and out.startswith("27 tensors used, 11 dropped\n")
    assert "fields of config.json left out: delay_load, " in out
    assert "base_model: someone/model" in (folder / "repo" / "README.md").read_text()
