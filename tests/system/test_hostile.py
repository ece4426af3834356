"""Every malformed or hostile adapter that we know, asked for from one real worker, which serves on.

`pytest -s tests/system/test_hostile.py` shows the message that each one's job got.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from shop import RealWorker, Shop, model_settings

from lorabatch import Job
from tests.bad_adapters import BAD, write
from tests.models import checkpoint

HARMLESS = ("good", None)
# Wrong for a vocabulary of nine tokens, which this model's is not.
GOOD_HERE = {"trained rows of added tokens alone", "trained rows of some added tokens"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sizes that the bad adapters are made for."""
    return checkpoint(tmp_path_factory.mktemp("hostile") / "model", head_dim=8)


def test_all_are_refused_by_name_and_everybody_else_is_served(model: Path, tmp_path: Path) -> None:
    folders = {}
    for number, bad in enumerate(BAD):
        folders[f"bad-{number}"] = tmp_path / "bad" / str(number)
        bad.make(folders[f"bad-{number}"])
    write(tmp_path / "good")
    configured = {**folders, "good": tmp_path / "good"}
    (tmp_path / "home").mkdir()
    shop = Shop(tmp_path / "home")
    shop.env |= model_settings(model) | {"LORABATCH_MAX_ADAPTER_RANK": "8"}
    shop.env["LORABATCH_ADAPTERS"] = ",".join(f"{n}={p}" for n, p in configured.items())
    worker = RealWorker(tmp_path / "worker.log", shop.env)
    shop.workers.append(worker)
    try:
        worker.wait_ready()
        jobs = {}
        for number, name in enumerate(folders):
            for asked in (name, HARMLESS[number % 2]):
                job = Job(
                    prompt="Hello there",
                    adapter_id=asked,
                    sampling_params={"max_new_tokens": 3, "ignore_eos": True},
                )
                jobs[job.job_id] = asked
                shop.ledger.accept([job])
                shop.send([job])
        shop.wait_ended(len(jobs))
        results = shop.ledger.results(list(jobs))
        assert worker.process.poll() is None, worker.text()
    finally:
        shop.close()
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
    taken = set()
    for job_id, asked in jobs.items():
        result = results[job_id]
        if asked in HARMLESS:
            assert result.state == "succeeded", result.error
            continue
        what = BAD[int(str(asked).removeprefix("bad-"))].what
        if result.error is None:
            taken.add(what)
            continue
        assert result.error.code in ("invalid_adapter", "unsupported_adapter", "adapter_set_aside")
        assert result.error.message.startswith(f"adapter '{asked}': ")
        assert str(tmp_path) not in result.error.message
        print(f"{what}\t{result.error.message}")
    assert taken <= GOOD_HERE
