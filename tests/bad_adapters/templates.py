"""Bad chat templates."""

from __future__ import annotations

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from tests.bad_adapters.making import Bad, with_file

TEMPLATES_ROWS: list[Bad] = [
    Bad(
        "chat template is an object",
        with_file("tokenizer_config.json", '{"chat_template": {"a": 1}}'),
        UnsupportedAdapter,
        ("chat_template", "one string"),
    ),
    Bad(
        "chat template is a list",
        with_file("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        UnsupportedAdapter,
        ("chat_template", "one string"),
    ),
    Bad(
        "tokenizer config is a list",
        with_file("tokenizer_config.json", "[]"),
        InvalidAdapter,
        ("JSON object",),
    ),
    Bad(
        "tokenizer config broken",
        with_file("tokenizer_config.json", "{"),
        InvalidAdapter,
        ("JSON object",),
    ),
    Bad(
        "tokenizer config deep",
        with_file("tokenizer_config.json", "[" * 200_000),
        InvalidAdapter,
        ("JSON object",),
    ),
    Bad(
        "template over 256 KiB",
        with_file("chat_template.jinja", "x" * (1 << 19)),
        InvalidAdapter,
        ("over", "bytes"),
    ),
    Bad(
        "template not UTF-8",
        with_file("chat_template.jinja", b"\xff\xfe"),
        InvalidAdapter,
        ("chat_template.jinja",),
    ),
]
