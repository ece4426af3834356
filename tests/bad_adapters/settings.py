"""Bad adapter_config.json: the file, its fields, its patterns."""

from __future__ import annotations

import math
from pathlib import Path

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from tests.bad_adapters.good import SETTINGS, Q, write
from tests.bad_adapters.making import Bad, with_config, with_file

SLOW = {"a": "(a+)+b", "?": ".?" * 60 + "X", "|": "(.|.)" * 33 + "X", "#": "(?x:(.+)#\n+X)"}


def _config_is_a_folder(folder: Path) -> None:
    write(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


SETTINGS_ROWS: list[Bad] = [
    # -- adapter_config.json as a file
    Bad("no config", with_file(SETTINGS, None), InvalidAdapter, ("adapter_config.json", "missing")),
    Bad(
        "config of 1 MiB and more",
        with_file(SETTINGS, " " * (1 << 20) + "{}"),
        InvalidAdapter,
        ("over", "bytes"),
    ),
    Bad(
        "config that is no JSON",
        with_file(SETTINGS, "{'r': 4}"),
        InvalidAdapter,
        ("not valid JSON",),
    ),
    Bad(
        "config cut off",
        with_file(SETTINGS, '{"peft_type": "LORA", "r"'),
        InvalidAdapter,
        ("not valid JSON",),
    ),
    Bad(
        "config not UTF-8",
        with_file(SETTINGS, b'{"r": "\xff"}'),
        InvalidAdapter,
        ("not valid JSON",),
    ),
    Bad(
        "config nested too deep",
        with_file(SETTINGS, "[" * 200_000),
        InvalidAdapter,
        ("not valid JSON",),
    ),
    Bad(
        "config number too long",
        with_file(SETTINGS, '{"r": ' + "9" * 9000 + "}"),
        InvalidAdapter,
        ("not valid",),
    ),
    Bad(
        "config is a list", with_file(SETTINGS, "[1]"), InvalidAdapter, ("wanted an object", "list")
    ),
    Bad("config is a folder", _config_is_a_folder, InvalidAdapter, ("adapter_config.json",)),
    # -- fields
    Bad(
        "no peft_type",
        lambda f: write(f, without=("peft_type",)),
        UnsupportedAdapter,
        ("peft_type", "'LORA'"),
    ),
    Bad(
        "another method",
        with_config(peft_type="LOHA"),
        UnsupportedAdapter,
        ("peft_type", "'LOHA'", "'LORA'"),
    ),
    Bad(
        "DoRA without magnitudes",
        with_config(use_dora=True),
        InvalidAdapter,
        (Q, "lora_A and lora_B without lora_magnitude_vector", "use_dora True"),
    ),
    Bad("bias", with_config(bias="some"), InvalidAdapter, ("bias", "'some'", "lora_only")),
    Bad(
        "lora_bias without biases",
        with_config(lora_bias=True),
        InvalidAdapter,
        (Q, "without lora_B_bias", "lora_bias True"),
    ),
    Bad(
        "lora_bias and DoRA",
        with_config(lora_bias=True, use_dora=True),
        UnsupportedAdapter,
        ("lora_bias with use_dora",),
    ),
    Bad(
        "modules_to_save",
        with_config(modules_to_save=["lm_head"]),
        InvalidAdapter,
        ("modules_to_save", "'lm_head'", "no weight"),
    ),
    Bad(
        "modules_to_save that are no names",
        with_config(modules_to_save="lm_head"),
        InvalidAdapter,
        ("modules_to_save", "wanted a list"),
    ),
    Bad(
        "token rows",
        with_config(trainable_token_indices=[5]),
        InvalidAdapter,
        ("trainable_token_indices", "no trainable_tokens_delta"),
    ),
    Bad(
        "3-D parameters",
        with_config(target_parameters=["experts.up"]),
        UnsupportedAdapter,
        ("target_parameters",),
    ),
    Bad(
        "replicated layers",
        with_config(layer_replication=[[0, 2]]),
        UnsupportedAdapter,
        ("layer_replication",),
    ),
    Bad(
        "aLoRA",
        with_config(alora_invocation_tokens=[3, 4]),
        UnsupportedAdapter,
        ("alora_invocation_tokens",),
    ),
    Bad("QALoRA", with_config(use_qalora=True), UnsupportedAdapter, ("use_qalora",)),
    Bad(
        "PiSSA",
        with_config(init_lora_weights="pissa_niter_16"),
        UnsupportedAdapter,
        ("pissa_niter_16", "convert"),
    ),
    Bad("OLoRA", with_config(init_lora_weights="olora"), UnsupportedAdapter, ("olora", "convert")),
    Bad("LoftQ", with_config(init_lora_weights="loftq"), UnsupportedAdapter, ("loftq", "convert")),
    Bad("CorDA", with_config(init_lora_weights="corda"), UnsupportedAdapter, ("corda", "convert")),
    Bad(
        "unknown init",
        with_config(init_lora_weights="magic"),
        UnsupportedAdapter,
        ("init_lora_weights", "'magic'"),
    ),
    Bad(
        "init that is a list",
        with_config(init_lora_weights=[]),
        UnsupportedAdapter,
        ("init_lora_weights",),
    ),
    Bad(
        "unknown field that is on",
        with_config(use_hyper=True),
        UnsupportedAdapter,
        ("use_hyper", "True", "off"),
    ),
    Bad(
        "rsLoRA that is no bool",
        with_config(use_rslora="no"),
        InvalidAdapter,
        ("use_rslora", "'no'"),
    ),
    Bad(
        "no rank",
        lambda f: write(f, without=("r",)),
        InvalidAdapter,
        ("r is None", "positive whole number"),
    ),
    Bad("rank 0", with_config(r=0), InvalidAdapter, ("r is 0", "positive whole number")),
    Bad("rank true", with_config(r=True), InvalidAdapter, ("r is True",)),
    Bad("rank as text", with_config(r="4"), InvalidAdapter, ("r is '4'",)),
    Bad("rank 4.0", with_config(r=4.0), InvalidAdapter, ("r is 4.0", "whole")),
    Bad(
        "alpha 0", with_config(lora_alpha=0), InvalidAdapter, ("lora_alpha is 0", "positive number")
    ),
    Bad("alpha NaN", with_config(lora_alpha=math.nan), InvalidAdapter, ("lora_alpha is nan",)),
    Bad("alpha infinite", with_config(lora_alpha=math.inf), InvalidAdapter, ("lora_alpha is inf",)),
    Bad(
        "alpha beyond fp32",
        with_config(lora_alpha=1e300),
        InvalidAdapter,
        ("lora_alpha is 1e+300",),
    ),
    Bad(
        "alpha beyond fp64",
        with_config(lora_alpha=10**400),
        InvalidAdapter,
        ("lora_alpha is 1000",),
    ),
    Bad(
        "base is a number",
        with_config(base_model_name_or_path=7),
        InvalidAdapter,
        ("base_model_name_or_path",),
    ),
    Bad(
        "another base model",
        with_config(base_model_name_or_path="acme/huge"),
        InvalidAdapter,
        ("'acme/huge'", "'acme/tiny'", "LORABATCH_BASE_MODEL_ALIASES"),
    ),
    # -- patterns
    Bad(
        "pattern is a list",
        with_config(rank_pattern=["q_proj"]),
        InvalidAdapter,
        ("rank_pattern", "an object"),
    ),
    Bad(
        "rank pattern 0",
        with_config(rank_pattern={"q_proj": 0}),
        InvalidAdapter,
        ("rank_pattern", "q_proj"),
    ),
    Bad(
        "alpha pattern text",
        with_config(alpha_pattern={"q": "8"}),
        InvalidAdapter,
        ("alpha_pattern", "'8'"),
    ),
    Bad(
        "broken pattern",
        with_config(rank_pattern={"q[": 4}),
        InvalidAdapter,
        ("'q['", "regular expression"),
    ),
    Bad(
        "global flag",
        with_config(rank_pattern={"(?i)Q_PROJ": 4}),
        UnsupportedAdapter,
        ("rank_pattern", "(?i)"),
    ),
    *(
        Bad(
            f"slow pattern {p[:12]!r}",
            with_config(rank_pattern={p: 4}),
            UnsupportedAdapter,
            ("rank_pattern", "involved"),
        )
        for p in SLOW.values()
    ),
    *(
        Bad(
            f"slow alpha {p[:12]!r}",
            with_config(alpha_pattern={p: 4}),
            UnsupportedAdapter,
            ("alpha_pattern", "involved"),
        )
        for p in SLOW.values()
    ),
    Bad(
        "hundreds of patterns",
        with_config(rank_pattern={f".*.*{i}X": 4 for i in range(300)}),
        UnsupportedAdapter,
        ("rank_pattern", "patterns"),
    ),
]
