"""`tar-hf push`: a folder to the Hub."""

from pathlib import Path


def add_parser(commands):
    parser = commands.add_parser(
        "push",
        help="upload a folder to the Hub",
        description="Uploads a folder to the Hub, once it loads in a Python process without tar-hf. "
        "Loading runs the Python code in the folder.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `convert` or `assemble` made")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; it is made where there is none yet")
    parser.add_argument("--private", action="store_true", help="make it private; an error where it is public already")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to, made where there is none yet")
    parser.add_argument("--token", help="instead of the one of `hf auth login`")
    parser.add_argument("--message", metavar="TEXT", help="first line of the commit")
    parser.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    parser.set_defaults(run=_push)


def _push(arguments):
    from tar_hf.conversion.publish import push_folder

    print(f"{arguments.folder}: loading it without tar-hf, then uploading", flush=True)
    url = push_folder(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private or None,
        revision=arguments.revision,
        token=arguments.token,
        commit_message=arguments.message,
        create_pr=arguments.create_pr,
    )
    print(f"{arguments.folder} -> {url}")
