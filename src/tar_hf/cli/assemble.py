"""`tar-hf assemble`: a language model, a TA-Tok and a de-tokenizer to one Tar repository."""

from pathlib import Path


def add_parser(commands):
    parser = commands.add_parser(
        "assemble",
        help="put converted parts together as one repository",
        description="Copies what `convert` made to one repository: the language model at the root, ta_tok/ and "
        "detokenizer/ below.",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("--llm", type=Path, required=True, metavar="DIR", help="the language model")
    parser.add_argument("--ta-tok", type=Path, required=True, metavar="DIR", help="the image tokenizer")
    parser.add_argument("--detokenizer", type=Path, required=True, metavar="DIR", help="AR-DTok or the diffusion one")
    parser.set_defaults(run=_assemble)


def _assemble(arguments):
    from tar_hf.conversion.assemble import assemble

    assemble(arguments.output, arguments.llm, arguments.ta_tok, arguments.detokenizer)
    print(f"{arguments.llm} + {arguments.ta_tok} + {arguments.detokenizer} -> {arguments.output}")
