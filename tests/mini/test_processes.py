"""Processes side by side: whose lines are whose, what share each has, and that none is left behind."""

import subprocess
import sys
import time

import pytest

from tar_hf.mini.processes import Processes


def python(code):
    return [sys.executable, "-c", code]


def test_lines_say_whose_they_are(capsys):
    with Processes() as processes:
        processes.start(
            "one", python("import sys; print('a\\n\\nb'); print('c', file=sys.stderr); raise SystemExit(4)")
        )
        assert processes.wait() == ("one", 4) and processes.names == set()
    captured = capsys.readouterr()
    assert captured.out == "[one] a\n[one] b\n" and captured.err == "[one] c\n"


def test_without_names_they_write_where_we_do(capfd):
    with Processes(name_lines=False) as processes:
        processes.start("one", python("print('a')"))
        assert processes.wait() == ("one", 0)
    assert capfd.readouterr().out == "a\n"


def test_who_ends_first_is_told_first(tmp_path):
    sign = tmp_path / "sign"
    with Processes() as processes:
        processes.start("slow", python(f"import os, time\nwhile not os.path.exists({str(sign)!r}): time.sleep(0.02)"))
        processes.start("fast", python("pass"))
        assert processes.names == {"slow", "fast"}
        assert processes.wait() == ("fast", 0) and processes.names == {"slow"}
        sign.touch()
        assert processes.wait() == ("slow", 0) and processes.names == set()


def test_lines_come_while_it_runs(capsys):
    with Processes() as processes:
        processes.start("one", python("import time; print('here'); time.sleep(600)"))
        end = time.monotonic() + 60
        while "[one] here" not in capsys.readouterr().out:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_threads_are_a_process_own(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    with Processes() as processes:
        for name, threads in (("some", 3), ("all", None)):
            processes.start(name, python(code), threads)
            processes.wait()
    assert capsys.readouterr().out == "[some] 3\n[all] 7\n"


def test_none_is_left_behind(monkeypatch):
    started, popen = [], subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt), Processes() as processes:
        for name in ("one", "two"):
            processes.start(name, python("import time; time.sleep(600)"))
        raise KeyboardInterrupt
    assert len(started) == 2 and all(process.returncode not in (None, 0) for process in started)


def test_nothing_to_wait_for():
    with Processes() as processes, pytest.raises(RuntimeError, match="no process runs"):
        processes.wait()
