"""`tar-hf encode`, `decode` and `reconstruct`: pictures to codes, codes to pictures, and both in turn."""

import json
from pathlib import Path

from tar_hf._version import __version__
from tar_hf.cli.inputs import check_codes, check_pictures, read_codes
from tar_hf.cli.model import check_model, load_model, local_ta_tok, model_settings
from tar_hf.cli.options import add_drawing_options, add_file_output, add_model_options, add_scale_option
from tar_hf.cli.output import check_new_file, save_png
from tar_hf.cli.progress import progress
from tar_hf.new_files import new_file, new_folder


def add_parsers(commands):
    parser = commands.add_parser(
        "encode",
        help="turn pictures into codes",
        description="Writes a safetensors file with the tensor `codes` (images, N), and the scale, the model and the "
        "names of the pictures in its metadata.",
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="the pictures")
    add_file_output(parser, "CODES.safetensors")
    add_model_options(parser)
    add_scale_option(parser)
    parser.set_defaults(run=_encode)

    parser = commands.add_parser(
        "decode",
        help="turn codes into pictures",
        description="Draws the codes that `encode` wrote, as 0.png, 1.png and so on. Image i gets the seed + i.",
    )
    parser.add_argument("codes", type=Path, metavar="CODES", help="what `encode` wrote")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder to make; it must not exist"
    )
    add_model_options(parser)
    add_drawing_options(parser)
    parser.set_defaults(run=_decode)

    parser = commands.add_parser(
        "reconstruct",
        help="turn a picture into codes and back",
        description="Shows what of a picture its codes keep.",
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture")
    add_file_output(parser, "OUT.png")
    add_model_options(parser)
    add_drawing_options(parser)
    add_scale_option(parser)
    parser.set_defaults(run=_reconstruct)


def _encode(arguments):
    check_new_file(arguments.output, ".safetensors", arguments.overwrite)
    check_model(arguments, "ta_tok")
    check_pictures(arguments.images)
    pipe = load_model(arguments, "encoder")

    import torch
    from safetensors.torch import save

    codes = []
    with progress() as report:
        for i, image in enumerate(arguments.images):  # one at a time: pixels need far more memory than codes
            codes.append(pipe.encode(image, scale=arguments.scale).cpu())
            report("encode", i + 1, len(arguments.images))
    metadata = {
        "scale": str(arguments.scale),
        "model": model_settings(arguments)["model"],
        "files": json.dumps([image.name for image in arguments.images]),
        "software": f"tar-hf {__version__}",
    }
    with new_file(arguments.output) as unfinished:
        unfinished.write_bytes(save({"codes": torch.cat(codes)}, metadata))
    print(arguments.output)


def _decode(arguments):
    check_model(arguments, "ta_tok", "detokenizer")
    codes, names = read_codes(arguments.codes)
    if config := local_ta_tok(arguments.model):
        check_codes(codes, config)
    digits = len(str(len(codes) - 1))  # so that they sort in order
    with new_folder(arguments.output) as folder:
        pipe = load_model(arguments, "decoder", "detokenizer")
        with progress() as report:
            for i, row in enumerate(codes.split(1)):
                report("images", i, len(codes))
                image = _draw(pipe.decode, row, arguments, arguments.seed + i, report)[0]
                made = {"seed": arguments.seed + i, "codes": arguments.codes.name, "index": i}
                if names is not None:
                    made["image"] = names[i]
                save_png(folder / f"{i:0{digits}}.png", image, _settings("decode", arguments) | made)
    print(arguments.output)


def _reconstruct(arguments):
    check_new_file(arguments.output, ".png", arguments.overwrite)
    check_model(arguments, "ta_tok", "detokenizer")
    check_pictures([arguments.image])
    pipe = load_model(arguments, "encoder", "decoder", "detokenizer")
    with progress() as report:
        image = _draw(pipe.reconstruct, arguments.image, arguments, arguments.seed, report, scale=arguments.scale)
    made = {"seed": arguments.seed, "image": arguments.image.name, "scale": arguments.scale}
    save_png(arguments.output, image, _settings("reconstruct", arguments) | made)
    print(arguments.output)


def _draw(draw, what, arguments, seed, report, **options):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return draw(what, guidance_scale=arguments.guidance_scale, generator=generator, callback=report, **options)


def _settings(command, arguments):
    return {"command": command, **model_settings(arguments), "guidance_scale": arguments.guidance_scale}
