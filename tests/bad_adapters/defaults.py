"""Bad generation defaults and end tokens."""

from __future__ import annotations

import json
from typing import Any

from lorabatch.errors import InvalidAdapter
from tests.bad_adapters.making import Bad, with_file

GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"


def row(what: str, fields: dict[str, Any], *words: str, file: str = GENERATION) -> Bad:
    return Bad(what, with_file(file, json.dumps(fields)), InvalidAdapter, (file, *words))


def broken(what: str, content: bytes | str, *words: str) -> Bad:
    return Bad(what, with_file(GENERATION, content), InvalidAdapter, (GENERATION, *words))


DEFAULTS_ROWS: list[Bad] = [
    broken("generation config broken", "{", "JSON object"),
    broken("generation config is a list", "[]", "JSON object"),
    broken("generation config deep", "[" * 200_000, "JSON object"),
    broken("generation config not UTF-8", b"\xff\xfe", "JSON object"),
    broken("generation config over 32 MiB", " " * (1 << 25) + "{}", "over", "bytes"),
    broken("NaN temperature", '{"temperature": NaN}', "temperature", "finite"),
    row("a negative temperature", {"temperature": -1.0}, "temperature", "-1.0"),
    row("temperature is a text", {"do_sample": True, "temperature": "hot"}, "'hot'"),
    row("top_p 0", {"top_p": 0.0}, "top_p", "greater than 0", "0.0"),
    row("top_k below 0", {"top_k": -1}, "top_k", "-1"),
    row("top_k is a fraction", {"top_k": 1.5}, "top_k", "1.5"),
    row("min_p over 1", {"min_p": 2.0}, "min_p", "less than or equal to 1", "2.0"),
    row("repetition penalty 0", {"repetition_penalty": 0}, "repetition_penalty", "got 0"),
    row("no new tokens", {"max_new_tokens": 0}, "max_new_tokens", "got 0"),
    row("10^9 new tokens", {"max_new_tokens": 10**9}, "max_new_tokens", "131072"),
    row("do_sample is a text", {"do_sample": "yes"}, "do_sample", "'yes'", "true or false"),
    row("an empty stop string", {"stop_strings": [""]}, "stop_strings", "at least 1 character"),
    row("a stop string is a number", {"stop_strings": 7}, "stop_strings", "got 7"),
    row("17 stop strings", {"stop_strings": list("abcdefghijklmnopq")}, "stop_strings", "16"),
    row("end token out of the vocabulary", {"eos_token_id": 9}, "eos_token_id", "below 9"),
    row("an end token below 0", {"eos_token_id": [1, -1]}, "eos_token_id", "-1"),
    row("an end token is a text", {"eos_token_id": "</s>"}, "eos_token_id", "'</s>'"),
    row("an end token is true", {"eos_token_id": True}, "eos_token_id", "True"),
    row("eos_token is a number", {"eos_token": 3}, "eos_token", "is 3", file=TOKENIZER),
    row("eos_token without content", {"eos_token": {}}, "eos_token", "content", file=TOKENIZER),
    row("eos_token is no text", {"eos_token": "\ud800"}, "eos_token", file=TOKENIZER),
    row("a chat template over 256 KiB", {"chat_template": "x" * (1 << 19)}, "over", file=TOKENIZER),
]
