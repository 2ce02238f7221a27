"""These tests build on the libraries' own, which only `.ci/library-tests` brings: any other run leaves them out."""

from importlib.util import find_spec

TESTS = {
    "transformers_tests": ["test_ar_detok_common.py", "test_ta_tok_common.py"],
    "diffusers_tests": ["test_tar_diffusion_detok_common.py"],
}
collect_ignore = [file for library, files in TESTS.items() if find_spec(library) is None for file in files]


def pytest_terminal_summary(terminalreporter):
    for file in collect_ignore:
        terminalreporter.write_line(f"tests/library/{file} was left out: .ci/library-tests runs it")
