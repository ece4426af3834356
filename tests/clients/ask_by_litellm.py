"""What LiteLLM answers, as JSON: it leaves event loops open, so that it has a process of its own.

python ask_by_litellm.py URL KEY
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm


def asked(url: str, key: str) -> dict[str, Any]:
    given: dict[str, Any] = {
        "api_base": url,
        "api_key": key,
        "messages": [{"role": "user", "content": "How many books are there?"}],
        "max_tokens": 24,
        "temperature": 0,
        "num_retries": 0,
    }
    answer = litellm.completion(model="openai/sql", **given)
    chunks = litellm.completion(model="openai/sql", stream=True, **given)
    later = asyncio.run(litellm.acompletion(model="openai/sql", **given))
    try:
        litellm.completion(model="openai/nobody", **given)
        unknown = "answered"
    except litellm.NotFoundError as error:
        unknown = str(error)
    return {
        "chat": answer.choices[0].message.content,
        "tokens": answer.usage.completion_tokens,
        "chat_stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "async_chat": later.choices[0].message.content,
        "unknown_adapter": unknown,
    }


if __name__ == "__main__":
    print(json.dumps(asked(*sys.argv[1:])))
