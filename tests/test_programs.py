"""A fork of a nursery is what `python` would be: tests/programs.py."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.programs import ROOT, Program, run

SEEN = """
import json, os, signal, sys
os.environ.pop("LC_CTYPE", None)  # Python sets it where there is no locale
seen = dict(argv=sys.argv, main=sys.modules["__main__"].__name__, path=sys.path, folder=os.getcwd(),
            environment=dict(os.environ), interrupt=str(signal.getsignal(signal.SIGINT)),
            child=str(signal.getsignal(signal.SIGCHLD)), files=sorted(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")), original=sys.orig_argv)
"""


def test_it_sees_what_a_start_of_python_sees(tmp_path):
    program = SEEN + "json.dump(seen, sys.stdout)"
    place = dict(cwd=tmp_path, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OF_ITS_OWN": "1"})
    command = ["-c", program, "a", "b c"]
    start = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, **place)  # pyright: ignore
    fork = run(command, timeout=60, **place)  # pyright: ignore
    assert fork.stderr == "" and json.loads(fork.stdout) == json.loads(start.stdout)


def test_a_module_sees_it_too(tmp_path):
    (tmp_path / "looks.py").write_text(SEEN + 'seen["name"] = __name__\njson.dump(seen, sys.stdout)')
    command = ["-m", "looks", "a"]
    place = dict(cwd=tmp_path, env=dict(os.environ))
    start = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, **place)  # pyright: ignore
    fork = run(command, timeout=60, **place)  # pyright: ignore
    assert fork.stderr == "" and json.loads(fork.stdout) == json.loads(start.stdout)


@pytest.mark.parametrize(
    "text, code, said",
    [
        ("pass", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('bye')", 1, "bye\n"),
        ("import atexit; atexit.register(print, 'at the end', file=__import__('sys').stderr)", 0, "at the end\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_it_ends_as_a_start_does(text, code, said):
    done = run(["-c", text], timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_an_error_has_its_traceback_and_code_1():
    done = run(["-c", "1 / 0"], timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_signals_pipes_and_time():
    pipe = subprocess.PIPE
    with Program(["-c", "print(input()[::-1], flush=True); input()"], stdin=pipe, stdout=pipe) as program:
        assert program.stdin is not None and program.stdout is not None
        assert program.poll() is None
        program.stdin.write("abc\n")
        program.stdin.flush()
        assert program.stdout.readline() == "cba\n"
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(0.05)
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == program.poll() == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        run(["-c", "input()"], timeout=0.2)
    with pytest.raises(subprocess.TimeoutExpired):
        run(["-c", "import time; time.sleep(60)"], timeout=0.2)


def test_no_two_draw_the_same_and_ranks_hash_otherwise():
    text = "import random, numpy; print(random.random(), numpy.random.rand(), hash('a'), sep='\\n')"
    drawn = []
    for nursery in (0, 0, 1):
        with Program(["-c", text], nursery=nursery, stdout=subprocess.PIPE) as program:
            drawn.append(program.communicate(timeout=60)[0].split())
    for first, second, third in list(zip(*drawn, strict=True))[:2]:
        assert len({first, second, third}) == 3
    assert drawn[0][2] == drawn[1][2] != drawn[2][2]
