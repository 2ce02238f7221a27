"""A whole Tar repository on a stand-in for the Hub: pushed by TarPipeline, then used by its id, with and without us."""

import json
import subprocess
import sys
import textwrap

import pytest

from hub_server import hub_server

pytestmark = pytest.mark.slow

# The parts come when they are needed, and only those.
PUSH_AND_USE = """
import json, os, sys, torch
from pathlib import Path
from tar_hf import TarPipeline

print(TarPipeline.from_pretrained(sys.argv[1]).push_to_hub("user/tar", private=False))

def names():
    home = Path(os.environ["HF_HOME"])
    return sorted({path.parent.name for path in home.rglob("*.safetensors")} & {"ta_tok", "detokenizer"})

pipe = TarPipeline.from_pretrained("user/tar", dtype=torch.float32, attn_implementation="eager", device_map="cpu")
fetched = [names()]
text = pipe.generate_text("Hello", max_new_tokens=2)
codes = pipe("a red circle", scale=3, generator=torch.Generator().manual_seed(0)).codes[0].tolist()
fetched.append(names())
assert pipe.model.config._attn_implementation == pipe.decoder.config._attn_implementation == "eager"
print(json.dumps([fetched, codes]))
"""

WITHOUT = """
import sys
sys.modules["tar_hf"] = None
import json, torch
from transformers import pipeline

pipe = pipeline("text-to-image", model="user/tar", trust_remote_code=True)
print(json.dumps(pipe("a red circle", scale=3, generator=torch.Generator().manual_seed(0))["codes"]))
"""


def test_pushed_and_used_by_its_id(tar_repo, tmp_path):
    def run(name, script, *arguments):
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            env=hub.environment(tmp_path / name),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()

    with hub_server() as hub:
        *_, url, used = run("with", PUSH_AND_USE, tar_repo)
        (before, after), codes = json.loads(used)
        assert url == f"{hub.url}/user/tar" and before == [] and after == ["detokenizer", "ta_tok"]
        assert json.loads(run("without", WITHOUT)[-1]) == codes and len(codes) == 81
