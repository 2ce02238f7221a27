"""These tests build on transformers' own, which only `.ci/library-tests` brings: any other run leaves them out."""

from importlib.util import find_spec

FOUND = find_spec("transformers_tests") is not None
collect_ignore_glob = [] if FOUND else ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    if not FOUND:
        terminalreporter.write_line("tests/library was left out: .ci/library-tests runs it")
