"""`tar-hf pretokenize`: a data set's pictures to codes, once, before training."""

from pathlib import Path

from tar_hf.cli.model import check_model
from tar_hf.cli.options import count, natural
from tar_hf.cli.progress import progress


def add_parser(commands):
    parser = commands.add_parser(
        "pretokenize",
        help="turn a data set's pictures into codes",
        description="Writes a data set as parquet files with codes in the place of its pictures, which training reads "
        "without a vision tower. A call that was killed goes on with the missing files when it is given again. On "
        "several GPUs: accelerate launch -m tar_hf.cli.main pretokenize ...",
    )
    parser.add_argument("source", metavar="SOURCE", help="the rows: file, folder or Hub id, as a recipe names sources")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to make or to finish")
    parser.add_argument("--model", metavar="REPO", help="Tar repository, or tar-mini, for the codes of its TA-Tok")
    parser.add_argument("--ta-tok", metavar="REPO", help="TA-Tok repository, for its codes")
    parser.add_argument(
        "--scales", type=int, choices=(1, 2, 3), nargs="+", help="of the codes; default: all that TA-Tok has"
    )
    parser.add_argument("--ar-detok", metavar="REPO", help="AR-DTok repository or a VQ autoencoder, for its VQ tokens")
    parser.add_argument(
        "--diffusion-detok", metavar="REPO", help="diffusion de-tokenizer, SanaPipeline or DC-AE, for its latents"
    )
    parser.add_argument("--image-size", type=count, metavar="S", help="of the latents' pictures; default: its own")
    parser.add_argument("--image-folder", metavar="DIR", help="what relative picture paths start from")
    parser.add_argument("--split", default="train", help="of a Hub data set; default train")
    parser.add_argument("--limit", help="rows that take part: first:1000, end:10%%, random:1000")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="images at a time; default 8")
    parser.add_argument("--num-workers", type=natural, default=0, metavar="N", help="processes that read pictures")
    parser.add_argument("--rows-per-file", type=count, default=1000, metavar="N", help="default 1000")
    parser.add_argument(
        "--max-bad-rows", type=natural, default=100, metavar="N", help="how many may be left out; default 100"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the one of the files")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a GPU for each process, else the CPU")
    parser.set_defaults(run=_run)


def _run(arguments):
    if arguments.model is not None and arguments.ta_tok is not None:
        raise ValueError("--model names a TA-Tok already: leave out --ta-tok")
    if not any((arguments.model, arguments.ta_tok, arguments.ar_detok, arguments.diffusion_detok)):
        raise ValueError(
            "expected at least one of --model, --ta-tok, --ar-detok and --diffusion-detok, got none: --model tar-mini "
            "is the small model in the package"
        )
    try:
        from tar_hf.training.pretokenize import pretokenize
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] == "tar_hf":
            raise
        raise ValueError(f"pretokenize needs {error.name}: pip install 'tar-hf[train]'") from error
    from tar_hf.training.mixture import TooManyBadRows
    from tar_hf.training.recipe import SourceRecipe

    source = SourceRecipe(
        arguments.source, limit=arguments.limit, image_folder=arguments.image_folder, split=arguments.split
    )
    names = ("scales", "ar_detok", "diffusion_detok", "image_size", "batch_size", "num_workers", "rows_per_file")
    options = {name: getattr(arguments, name) for name in (*names, "max_bad_rows", "dtype", "device")}
    ta_tok = arguments.ta_tok
    if arguments.model is not None:
        check_model(arguments, "ta_tok")
        ta_tok = _ta_tok(arguments.model)
    _check_device(arguments.device)
    with progress() as report:
        try:
            made = pretokenize(source, arguments.output, ta_tok=ta_tok, callback=report, **options)
        except TooManyBadRows as error:
            raise ValueError(str(error)) from error
    print(f"{arguments.output}: {made}")


def _ta_tok(model):
    """Where the TA-Tok of a Tar repository is: a folder or a Hub id."""
    from tar_hf.pipelines.tar_repository import RepoFolder, read_parts

    noted = read_parts(model).get("ta_tok", "ta_tok")
    return RepoFolder(model, noted, {}).fetch() if noted == "ta_tok" else noted


def _check_device(device):
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
