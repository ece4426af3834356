"""What a web app installs stays light: no torch behind the contract or the producer."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = "torch transformers numpy triton safetensors huggingface_hub peft gguf".split()


@pytest.mark.parametrize(
    "module",
    [
        "lorabatch",
        "lorabatch.queue",
        "lorabatch_producer",
        "lorabatch_producer.cli",
        "lorabatch_producer.result_backend",
    ],
)
def test_importing_loads_nothing_heavy_and_warns_of_nothing(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_contract_module_lists_what_it_exports() -> None:
    import lorabatch
    import lorabatch.errors

    for module in (lorabatch, lorabatch.errors):
        assert sorted(module.__all__) == list(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def test_every_error_has_its_own_code_and_a_place_in_the_tree() -> None:
    import lorabatch.errors as errors

    classes = [getattr(errors, name) for name in errors.__all__ if name != "explain"]
    assert len({kind.code for kind in classes}) == len(classes)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in classes)
