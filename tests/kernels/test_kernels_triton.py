"""The Triton kernels without a GPU, each way in a process of its own.

Whether triton interprets or compiles is settled when it is first imported, and other tests of the
same session may have imported it. So the two files below run under pytest in fresh processes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_tests(file: str, at_least: int, **environment: str) -> None:
    dropped = ("TRITON_", "PYTEST_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "--noconftest"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(HERE.parents[1])]
    command += ["-c", str(HERE.parents[1] / "pyproject.toml")]
    # The interpreter multiplies with numpy's OpenBLAS, whose products for Haswell and Zen round a
    # row otherwise in a tile of another width; those of the oldest x86 do not.
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Prescott", **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    counts = re.search(r"^(\d+) passed in [^,]*$", report, re.MULTILINE)
    assert counts, f"something was skipped or warned about:\n{report}"
    assert int(counts[1]) >= at_least, report


def test_kernels_agree_with_their_references_in_the_interpreter():
    run_tests("interpreted_kernels.py", at_least=68, TRITON_INTERPRET="1")


def test_groups_agree_with_their_references_in_the_interpreter():
    run_tests("interpreted_groups.py", at_least=60, TRITON_INTERPRET="1")


def test_kernels_compile_ahead_of_time(tmp_path):
    run_tests("compiled_kernels.py", at_least=285, TRITON_CACHE_DIR=str(tmp_path))


def test_attention_agrees_with_its_reference_in_the_interpreter():
    run_tests("interpreted_attention.py", at_least=90, TRITON_INTERPRET="1")


def test_attention_compiles_ahead_of_time(tmp_path):
    run_tests("compiled_attention.py", at_least=104, TRITON_CACHE_DIR=str(tmp_path))


def test_rows_agree_with_transformers_in_the_interpreter():
    run_tests("interpreted_rows.py", at_least=17, TRITON_INTERPRET="1")


def test_rows_compile_ahead_of_time(tmp_path):
    run_tests("compiled_rows.py", at_least=48, TRITON_CACHE_DIR=str(tmp_path))
