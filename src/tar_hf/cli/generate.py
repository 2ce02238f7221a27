"""`tar-hf generate`: pictures from prompts, or from prompts and pictures."""

from pathlib import Path

from tar_hf.cli.inputs import check_pictures, check_prompts, read_prompts
from tar_hf.cli.model import check_model, load_model, model_settings
from tar_hf.cli.options import (
    add_choosing_options,
    add_drawing_options,
    add_file_output,
    add_model_options,
    add_scale_option,
    count,
    limit,
    positive,
    share,
)
from tar_hf.cli.output import check_new_file, save_png
from tar_hf.cli.progress import progress
from tar_hf.contact_sheet import make_sheet, make_tile


def add_parser(commands):
    parser = commands.add_parser(
        "generate",
        help="draw pictures from prompts",
        description="Draws pictures from prompts, or from prompts and pictures. Several become OUT-0.png, OUT-1.png "
        "and so on, with OUT-sheet.png to see them together. A picture depends on its own prompt and seed only.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw; <image> marks where an image goes")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="prompts in UTF-8, one a line")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="goes with every prompt; repeatable"
    )
    add_file_output(parser, "OUT.png")
    parser.add_argument("--num-images", type=count, default=1, metavar="N", help="for each prompt; default 1")
    add_model_options(parser)
    add_drawing_options(parser)
    add_scale_option(parser)
    add_scale_option(parser, "--image-scale", "the same for the images that come with the prompt; default 1")
    parser.add_argument("--temperature", type=positive, default=1.0, metavar="T", help="of the codes; default 1")
    parser.add_argument("--top-p", type=share, default=0.95, metavar="P", help="1 is no limit; default 0.95")
    parser.add_argument("--top-k", type=limit, default=1200, metavar="K", help="0 is no limit; default 1200")
    add_choosing_options(parser)
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--jacobi-window",
        type=count,
        metavar="W",
        help="draw W codes and tokens a step: the same picture in fewer steps",
    )
    steps.add_argument(
        "--compile",
        action="store_true",
        help="draw in compiled steps, which pays for many pictures: the first takes a minute or so longer",
    )
    parser.add_argument(
        "--batch-size",
        type=count,
        default=1,
        metavar="N",
        help="pictures drawn at once: more are faster on a GPU, and may then differ in the last digit; default 1",
    )
    parser.set_defaults(run=_generate)


# What of the arguments goes to `TarPipeline` as it is, and into the pictures.
SETTINGS = (
    *("scale", "image_scale", "temperature", "top_p", "top_k"),
    *("guidance_scale", "prompt_guidance_scale"),
    *("self_reflect", "self_reflect_pictures", "self_reflect_likelihood"),
)


def _generate(arguments):
    prompts = read_prompts(arguments.prompts, arguments.prompts_file)
    samples = [(prompt, arguments.seed + i) for prompt in prompts for i in range(arguments.num_images)]
    files, sheet = _outputs(arguments.output, len(samples))
    for file in (*files, sheet):
        if file is not None:
            check_new_file(file, ".png", arguments.overwrite)
    check_model(arguments, "ta_tok", "detokenizer")
    check_prompts(prompts, len(arguments.image))
    check_pictures(arguments.image)
    pipe = load_model(arguments, *(["encoder"] if arguments.image else []), "model", "decoder", "detokenizer")

    options = {name: getattr(arguments, name) for name in SETTINGS}
    settings = {"command": "generate", **model_settings(arguments), **options, "batch_size": arguments.batch_size}
    window = {"jacobi_window": arguments.jacobi_window}  # says nothing about the picture
    if arguments.image:
        settings["images"] = [image.name for image in arguments.image]
    tiles = []
    with progress() as report:
        for first in range(0, len(samples), arguments.batch_size):
            if sheet is not None:
                report("images", first, len(samples))
            batch = samples[first : first + arguments.batch_size]
            # A last batch that is smaller would be compiled for itself.
            whole = len(batch) == min(arguments.batch_size, len(samples))
            compiled = arguments.compile and whole
            output = _draw(pipe, batch, arguments.image, compiled, callback=report, **options, **window)
            for i, (prompt, seed) in enumerate(batch):
                made = {"prompt": prompt, "seed": seed, **settings}
                if output.scores is not None:
                    made["score"] = output.scores[i, output.chosen[i]].item()
                save_png(files[first + i], output.images[i], made)
                print(files[first + i], flush=True)
                if sheet is not None:
                    caption = prompt if arguments.num_images == 1 else f"seed {seed}: {prompt}"
                    tiles.append(make_tile(output.images[i], caption))
    if sheet is not None:
        rows_are_prompts = min(len(prompts), arguments.num_images) > 1
        picture = make_sheet(tiles, columns=arguments.num_images if rows_are_prompts else None)
        save_png(sheet, picture, {"prompt": "\n".join(prompts), "seed": arguments.seed, **settings})
        print(sheet)


def _draw(pipe, batch, images, compiled, **options):
    import torch

    from tar_hf.pipelines.tar_drawing import compiled_steps

    if compiled:
        options |= compiled_steps()
    generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
    prompts = [prompt for prompt, _ in batch]
    return pipe(prompts, images=[images] * len(batch), generator=generators, **options)


def _outputs(path, samples):
    """The files of the pictures and of the contact sheet, which a single picture has not."""
    if samples == 1:
        return [path], None
    digits = len(str(samples - 1))  # so that they sort in order
    return [path.with_stem(f"{path.stem}-{i:0{digits}}") for i in range(samples)], path.with_stem(f"{path.stem}-sheet")
