"""`tar-hf convert`: the original release's checkpoints to repositories."""

from pathlib import Path


def add_parser(commands):
    parser = commands.add_parser("convert", help="turn an original checkpoint into a safetensors repository")
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)

    kind = _add_kind(kinds, "ta-tok", _ta_tok, "ta_tok.pth, the image tokenizer")
    kind.add_argument("--vision-config", type=Path, metavar="FILE", help="config.json of the SigLIP vision tower")
    kind.add_argument("--num-attention-heads", type=int, metavar="N", help="heads of the vision tower")

    kind = _add_kind(kinds, "ar-detok", _ar_detok, "ar_dtok_*.pth, the autoregressive de-tokenizer")
    kind.add_argument("--vqvae", type=Path, metavar="VQ.pt", required=True, help="its VQ autoencoder, vq_ds16_t2i.pt")
    kind.add_argument("--num-attention-heads", type=int, metavar="N", help="heads, where the checkpoint does not tell")

    kind = _add_kind(kinds, "diffusion-detok", _diffusion_detok, "the diffusion de-tokenizer's folder, a SanaPipeline")
    kind.add_argument("--ta-tok", type=Path, metavar="TA_TOK", help="converted TA-Tok, so that it draws from codes too")

    _add_kind(kinds, "llm", _llm, "the language model's folder, Qwen2 or llava_qwen")


def _add_kind(kinds, name, run, help):
    parser = kinds.add_parser(name, help=help, description=f"Converts {help}.")
    parser.add_argument("source", type=Path, metavar="SRC", help="what to convert")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("--base-model", metavar="REPO_ID", help="Hub id of the original, for the model card")
    parser.set_defaults(run=run)
    return parser


def _options(arguments, *names):
    """The named options that were given, so that the library's defaults hold for the others."""
    given = {name: getattr(arguments, name) for name in ("base_model", *names)}
    return {name: value for name, value in given.items() if value is not None}


def _ta_tok(arguments):
    from tar_hf.conversion import convert_ta_tok

    options = _options(arguments, "vision_config", "num_attention_heads")
    _report(arguments, convert_ta_tok(arguments.source, arguments.output, **options))


def _ar_detok(arguments):
    from tar_hf.conversion import convert_ar_detok

    options = _options(arguments, "vqvae", "num_attention_heads")
    _report(arguments, convert_ar_detok(arguments.source, arguments.output, **options))


def _diffusion_detok(arguments):
    from tar_hf.conversion import convert_diffusion_detok

    _report(arguments, convert_diffusion_detok(arguments.source, arguments.output, **_options(arguments, "ta_tok")))


def _llm(arguments):
    from tar_hf.conversion import convert_llm

    _report(arguments, convert_llm(arguments.source, arguments.output, **_options(arguments)))


def _report(arguments, report):
    print(report)
    print(f"{arguments.source} -> {arguments.output}")
