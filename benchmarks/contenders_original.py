"""The same cases in the original Tar code, whose checkout is in the path: run by its Python, see `worker.py`."""

import sys
from pathlib import Path

import torch
from clock import STEPS, random, seconds

_load = torch.load
torch.load = lambda *args, **options: _load(*args, **{"weights_only": False, **options})  # synthetic.py's own files


def ta_tok(options):
    import tok.ta_tok as code
    from transformers import SiglipConfig

    # The teacher's configuration is all that it would fetch.
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"image_size": 384, "patch_size": 14}

    class Offline:
        @staticmethod
        def from_pretrained(name):
            return SiglipConfig(vision_config=vision, text_config={"num_hidden_layers": 0})

    code.AutoConfig = Offline
    file = str(Path(options["sources"]) / "ta_tok.pth")
    model = code.TextAlignedTokenizer.from_checkpoint(file, load_teacher=False, input_type="rec").eval()
    model.set_vq_eval_deterministic()
    model.to(options["device"], getattr(torch, options["dtype"]))
    pixels = random(options["batch"], 3, 384, 384).clamp(-1, 1).add(1).div(2).to(model.device, model.dtype)
    with torch.no_grad():
        codes = model.encode(pixels, pool_scale=options["scale"])["bottleneck_rep"]
    return {
        "encode": lambda: seconds(lambda: model.encode(pixels, pool_scale=options["scale"])),
        "features": lambda: seconds(lambda: model.decode_from_bottleneck(codes)),
    }


def ar_detok(options):
    import tok.ar_dtok.ar_model as code
    import tok.ar_dtok.generate as generate

    model = code.ARModel.from_checkpoint(str(Path(options["sources"]) / "ar_dtok_lp_256px.pth")).eval()
    model.to(options["device"], getattr(torch, options["dtype"]))
    width = model.clip_proj.in_features
    condition = random(options["batch"], options["tokens"], width).to(model.device, model.dtype)
    if options["tokens"] != model.cls_token_num:
        raise SystemExit(f"the original reads {model.cls_token_num} tokens of condition only")
    guidance, length = options["guidance"], options["tokens"]
    combined = torch.cat([condition, torch.zeros_like(condition)]) if guidance > 1 else condition

    def first():
        with torch.device(model.device):
            model.setup_caches(len(combined), length + model.max_seq_length, condition.dtype)
        places = torch.arange(length, device=model.device)
        return generate.prefill(model, combined, places, guidance, temperature=1.0, top_k=0, top_p=1.0)

    def step():
        token = first()
        place = torch.tensor([length], device=model.device, dtype=torch.int)
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return seconds(lambda: generate.decode_n_tokens(model, token, place, STEPS, guidance, -1, **sampling)) / STEPS

    def sampling(call):
        def run():
            with model.sampling():
                return call()

        return run

    return {"prefill": sampling(lambda: seconds(first)), "token": sampling(step)}


STAGES = {"ta-tok": ta_tok, "ar-detok": ar_detok}
sys.dont_write_bytecode = True
