"""`tar-hf merge`: an adapter and its base to one repository."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2ForCausalLM

from tar_hf import TarPipeline


@pytest.fixture
def adapter(tar_repo, tmp_path):
    """An adapter of the golden system that changes one layer."""
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(tar_repo), LoraConfig(r=2, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merge(run, adapter, tar_repo, tmp_path):
    out = tmp_path / "new" / "repo"
    status, (printed,), _ = run("merge", adapter, out, model=None)
    assert status == 0 and printed == f"{adapter} -> {out}"
    merged, base = (Qwen2ForCausalLM.from_pretrained(folder).state_dict() for folder in (out, tar_repo))
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert TarPipeline.from_pretrained(out)("A cat.", scale=3).images[0].size == (64, 64)

    status, printed, err = run("merge", adapter, out, model=None)
    assert (status, printed) == (2, []) and "exists already" in err[-1]


def test_a_base_that_moved(run, adapter, tar_repo, tmp_path):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/gone"}))
    out = tmp_path / "out"
    status, printed, err = run("merge", adapter, out, model=None)
    assert (status, printed) == (2, []) and "base /gone is not there: pass where it is now" in err[-1]
    assert not out.exists()
    assert run("merge", adapter, out, "--base", tar_repo, model=None)[0] == 0 and (out / "tar.json").is_file()


def test_what_is_no_adapter(run, tar_repo, tmp_path):
    status, printed, err = run("merge", tar_repo, tmp_path / "out", model=None)
    assert (status, printed) == (2, []) and "holds no adapter_config.json" in err[-1]
    status, printed, err = run("merge", tmp_path / "none", tmp_path / "out", model=None)
    assert (status, printed) == (2, []) and "none" in err[-1] and not (tmp_path / "out").exists()
