"""What `stages.py` times of this package, and the floors below it. Runs as a process of its own, see `worker.py`.

A stage is a function of the options that loads what it needs and gives its cases: name -> call -> seconds. A floor is
the arithmetic that no implementation of the stage gets around, by the plainest call of the library, in this process.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from clock import STEPS, random, seconds, synchronize
from torch import nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tar_hf.modeling.packed_linear import PackedLinear, pack_linears


class After(StoppingCriteria):
    """Ends an image, or a text, after so many new tokens, and tells of each."""

    def __init__(self, count, on_token):
        self.count = count
        self.on_token = on_token

    def __call__(self, input_ids, scores, **options):
        self.on_token()
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.count, device=input_ids.device)


def ta_tok(options):
    """Images to codes, and codes to features."""
    from tar_hf import TATokModel

    model = TATokModel.from_pretrained(options["folder"], dtype=getattr(torch, options["dtype"])).eval()
    model.to(options["device"])
    if options["compile"]:
        model.encoder.compile()
    side, batch, scale = model.config.encoder_config.image_size, options["batch"], options["scale"]
    pixels = random(batch, 3, side, side, dtype=model.dtype, device=model.device).clamp(-1, 1)
    codes = model.encode(pixels, scale=scale)
    codebook = model.codebook
    rows = random(codes.numel(), codebook.shape[1], dtype=codebook.dtype, device=model.device)
    vectors = codebook[codes]

    return timed(
        {
            "encode": lambda: model.encode(pixels, scale=scale),
            "encode floor": lambda: (
                model.encoder(pixels),
                [(part @ codebook.mT).argmax(-1) for part in rows.split(729)],
            ),
            "features": lambda: model.decode(codes),
            "features floor": lambda: model.decoder(vectors),
        }
    )


def ar_detok(options):
    """The first token behind the condition, each one after it and in the middle, a step of Jacobi decoding for each of
    the windows, and VQ tokens to pixels."""
    from tar_hf import ARDeTokConfig, ARDeTokForCausalLM
    from tar_hf.modeling.jacobi_decoding import RowCache
    from tar_hf.modeling.modeling_ar_detok import decoding_dtype
    from tar_hf.modeling.reserved_cache import reserve

    dtype, settings = getattr(torch, options["dtype"]), int8(options)
    if options["grid"]:
        config = ARDeTokConfig.from_pretrained(options["folder"])
        config.vq_config.num_patches = options["grid"]
        settings |= {"config": config, "ignore_mismatched_sizes": True}  # positions of its own
    model = ARDeTokForCausalLM.from_pretrained(options["folder"], dtype=dtype, **settings)
    model.eval().to(options["device"])
    if options["pack"]:
        pack_linears(model)
    config, batch = model.config, options["batch"]
    condition = random(batch, options["tokens"], config.condition_size, dtype=model.dtype, device=model.device)
    settings = {"guidance_scale": options["guidance"], "generator": torch.Generator().manual_seed(0)}
    settings |= compiled(options)

    def draw(count, on_token=lambda: None):
        criteria = StoppingCriteriaList([After(count, on_token)])
        model.generate(condition, stopping_criteria=criteria, **settings)

    rows = batch * (2 if options["guidance"] > 1 else 1)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | PackedLinear)]
    ids = torch.zeros(batch, config.num_image_tokens, dtype=torch.long, device=model.device)

    # The loop's own step behind half of an image, which is what a token costs on the average.
    step = {"use_cache": True, "logits_to_keep": 1}
    if options["guidance"] > 1:
        step["guidance_scale"] = options["guidance"]
    half = ids[:, : config.num_image_tokens // 2]
    capacity = options["tokens"] + config.num_image_tokens
    cache = reserve(DynamicCache(config=config), capacity, decoding_dtype(model))
    model(half, condition, past_key_values=cache, **step)

    def middle():
        for _ in range(STEPS):
            model(ids[:, :1], past_key_values=cache, **step)
        cache.crop(-STEPS)

    def window_step(window):
        prefix = DynamicCache(config=config)
        model(half, condition, past_key_values=prefix, **step)
        windows = RowCache(prefix, window, dtype=decoding_dtype(model, window))
        first = options["tokens"] + half.shape[1]
        places = torch.arange(first, first + window, device=model.device).repeat(rows, 1)
        inputs = {"attention_mask": windows.move(places, first + window), "position_ids": places}
        inputs |= {**step, "past_key_values": windows, "logits_to_keep": 0}  # all of them
        return lambda: model(ids[:, :window], **inputs)

    windows = {f"window of {window}": window_step(window) for window in options["window"]}
    floors = {f"window of {w} floor": lambda w=w: products(linears, rows * w) for w in options["window"]}
    cases = timed(
        {
            **windows,
            **floors,
            "prefill": lambda: draw(1),
            "prefill floor": lambda: products(linears, rows * options["tokens"]),
            "token floor": lambda: products(linears, rows),
            "middle token floor": lambda: products(linears, rows),
            "pixels": lambda: model.decode_ids(ids),
        }
    )
    cases["token"] = per_token(draw, min(STEPS, config.num_image_tokens - 1))
    if not options["compile"]:  # which is the loop's, and not the model's
        cases["middle token"] = lambda: seconds(middle) / STEPS
    return cases


def llm(options):
    """One code of an image, against the library's own generation with the whole output layer."""
    from tar_hf import TarPipeline

    settings = {"dtype": getattr(torch, options["dtype"]), "pack": options["pack"], **int8(options)}
    pipe = TarPipeline.from_pretrained(options["folder"], **settings)
    model = pipe.to(options["device"]).model
    row = pipe._prompt_ids([("user", "A photo of a macaw")], [], drawing=1)
    uniform = torch.rand(options["batch"], STEPS + 1)
    steps = compiled(options)
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 1200}
    ids = torch.tensor([row] * options["batch"], device=model.device)

    def draw(count, on_token):
        pipe._draw_codes([row], uniform[:, :count], **sampling, **steps, callback=lambda *_: on_token())

    def library(count, on_token):
        config = GenerationConfig(**sampling, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
        criteria = StoppingCriteriaList([After(len(row) + count, on_token)])
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=criteria)

    linears = [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear | PackedLinear)]
    return {
        **timed({"code floor": lambda: products(linears, options["batch"])}),
        "code": per_token(draw),
        "code by model.generate": per_token(library),
    }


def load(options):
    """A repository until its weights can be used, and its file's bytes alone."""
    from transformers import AutoModel, AutoModelForCausalLM

    import tar_hf  # noqa: F401  (registers the classes)

    folder = Path(options["folder"])
    is_ta_tok = json.loads((folder / "config.json").read_text())["model_type"] == "ta_tok"
    kind = AutoModel if is_ta_tok else AutoModelForCausalLM
    files = sorted(folder.glob("*.safetensors"))

    def use():
        model = kind.from_pretrained(folder)
        sum(parameter.flatten()[:: 2**9].sum().item() for parameter in model.parameters())  # touches every page

    def read():
        for file in files:
            with file.open("rb", buffering=0) as stream:
                buffer = bytearray(2**24)
                while stream.readinto(buffer):
                    pass

    return timed({"load": use, "load floor": read})


def whole(options):
    """Pictures from prompts, and descriptions of pictures, with all parts loaded."""
    from PIL import Image

    from tar_hf import TarPipeline

    settings = {"dtype": getattr(torch, options["dtype"]), "pack": options["pack"]}
    pipe = TarPipeline.from_pretrained(options["folder"], **settings).to(options["device"])
    photo = Image.linear_gradient("L").convert("RGB")
    generator = torch.Generator(options["device"])
    prompt, scale, steps = "a red circle", options["scale"], compiled(options)
    return timed(
        {
            "picture": lambda: pipe(
                [prompt] * options["batch"], scale=scale, generator=generator.manual_seed(0), **steps
            ),
            "description": lambda: pipe.generate_text(
                ["Describe the image shortly."] * options["batch"],
                images=[photo] * options["batch"],
                scale=scale,
                max_new_tokens=16,
                min_new_tokens=16,
            ),
        }
    )


def int8(options):
    """What loads linear layers in int8."""
    if not options["int8"]:
        return {}
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


def compiled(options):
    """What draws in compiled steps."""
    from tar_hf.pipelines.tar_drawing import compiled_steps

    return compiled_steps() if options["compile"] else {}


def timed(cases):
    return {name: (lambda call=call: seconds(call)) for name, call in cases.items()}


def per_token(draw, steps=STEPS):
    """Seconds for a token behind the first, of a function that draws so many and tells of each."""

    def run():
        moments = []

        def on_token():
            if not moments or len(moments) == steps:  # the ends of what is timed
                synchronize()
            moments.append(time.perf_counter())

        draw(steps + 1, on_token)
        return (moments[steps] - moments[0]) / steps

    return run


def products(linears, rows):
    """Each layer's matrix product for so many rows, and nothing between them."""
    for linear in linears:
        if isinstance(linear, PackedLinear):
            linear(torch.zeros(rows, linear.in_features, dtype=linear.dtype))
        else:
            weight = linear.weight
            F.linear(torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=weight.device), weight)


STAGES = {"ta-tok": ta_tok, "ar-detok": ar_detok, "llm": llm, "load": load, "whole": whole}
