"""Workers that share a data folder take a GPU each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorabatch import Settings
from lorabatch.errors import SettingsError
from lorabatch_worker import free_gpu
from lorabatch_worker.free_gpu import ANY, take_gpu

IDS = ["GPU-a", "GPU-b"]
OTHER = "import sys; from pathlib import Path; from lorabatch_worker.free_gpu import take_gpu; "
TAKE = f"print(take_gpu(Path(sys.argv[1]), {IDS}), flush=True); input()"


@pytest.fixture(autouse=True)
def _free_again() -> Iterator[None]:
    yield
    for file in free_gpu._held:
        file.close()
    free_gpu._held.clear()


def test_each_takes_another_until_none_is_left(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OTHER + TAKE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "0\n"
        assert take_gpu(tmp_path, IDS) == 1
        with pytest.raises(SettingsError, match="of the 2 GPUs .* none is left by the workers"):
            take_gpu(tmp_path, IDS)
        other.kill()
    assert take_gpu(tmp_path, IDS) == 0


def test_it_is_a_device() -> None:
    assert Settings.load(device=ANY).device == "cuda:any"
