"""What a job's text must be like, as llguidance reads it: its `structured_outputs`, or its calls.

JSON is written as Python's json.dumps writes it: no spaces but one after a comma and a colon. Calls
of tools are blocks with nothing between them but a line's end, and nothing after them; a text that
need not call has any other text before them, in which no block begins. Raises nothing.
"""

from __future__ import annotations

import json
from typing import Any

from lorabatch.job import Job
from lorabatch.structured import StructuredOutputs
from lorabatch.tools import CALL_BEGINS, CALL_ENDS, NamedTool, Tool

__all__ = ["grammar_text"]

JSON_STYLE: dict[str, Any] = {
    "whitespace_flexible": False,  # or a small model writes spaces until it runs out of tokens
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
NO_ARGUMENTS = '{"type": "object", "additionalProperties": false}'
ANY_OBJECT = '{"type": "object"}'


def grammar_text(job: Job) -> tuple[str, str] | None:
    """The field that asks for it, and the grammar; None: any text will do."""
    if not job.constrained:
        return None
    wanted = job.sampling_params.structured_outputs
    return ("tools", _calls(job)) if wanted is None else ("structured_outputs", _form(wanted))


def _form(wanted: StructuredOutputs) -> str:
    from llguidance import LLMatcher

    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        texts = (json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        grammar = f"start: {' | '.join(texts)}"
        return LLMatcher.grammar_from_lark(grammar.replace("\x7f", r"\u007f"))  # it reads no DEL
    schema = wanted.json_schema or ANY_OBJECT
    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)  # type: ignore[arg-type]


def _calls(job: Job) -> str:
    """In Lark, with a rule for each tool that may be called."""
    from llguidance import LLMatcher

    tools, chosen, held = job.tools or (), job.tool_choice, job.tool_choice != "auto"
    if isinstance(chosen, NamedTool):
        tools = tuple(tool for tool in tools if tool.function.name == chosen.function.name)[:1]
    once = isinstance(chosen, NamedTool) or not job.parallel_tool_calls
    calls = "call" if once else f'call ("\\n{CALL_BEGINS}" call)*'
    rules = [
        f'start: "{CALL_BEGINS}" {calls}' if held else f"start: PLAIN | begun {calls}",
        f"PLAIN: /(?s:.*)/ & ~/(?s:.*){CALL_BEGINS}(?s:.*)/",
        f"begun[lazy]: /(?s:.*){CALL_BEGINS}/",
        f'call: "\\n" ({" | ".join(f"tool_{n}" for n in range(len(tools)))}) "\\n{CALL_ENDS}"',
    ]
    for number, tool in enumerate(tools):
        begins = json.dumps(f'{{"name": "{tool.function.name}", "arguments": ')
        rules += [
            f'tool_{number}: {begins} arguments_{number} "}}"',
            f"arguments_{number}: %json {_arguments(tool, held)}",
        ]
    return LLMatcher.grammar_from_lark("\n".join(rules))


def _arguments(tool: Tool, held: bool) -> str:
    """The schema of a tool's arguments, in our style of JSON."""
    by_schema = held or tool.function.strict
    schema = (tool.function.parameters or NO_ARGUMENTS) if by_schema else ANY_OBJECT
    return json.dumps({**json.loads(schema), "x-guidance": JSON_STYLE}, ensure_ascii=False)
