"""A page of HTML that shows texts side by side: prompts as rows, adapters as columns.

One file that loads nothing and runs nothing, wherever it is opened: all texts are escaped, and its
policy forbids scripts. Made a row at a time. Raises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Answer", "beginning", "ending", "table_row"]

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d4d4d4; --head: #f0f0f0;
  --faint: #595959; --wrong: #a40000; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --line: #3d3d3d; --head: #262626; --faint: #a6a6a6;
    --wrong: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 16px/1.45 system-ui, sans-serif; }
header { position: sticky; left: 0; max-width: 100vw; padding: 1rem; }
h1 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere; }
header p, .figures { margin: 0.4rem 0 0; color: var(--faint); font-size: 0.85rem; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%; }
th, td { padding: 0.6rem 0.8rem; border: 0 solid var(--line); border-width: 0 1px 1px 0;
  text-align: left; vertical-align: top; min-width: 16rem; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--head); }
tbody th { font-weight: normal; background: var(--head); }
.text { white-space: pre-wrap; unicode-bidi: isolate; }
.error { color: var(--wrong); white-space: pre-wrap; unicode-bidi: isolate; }
.label { display: none; font-weight: bold; }
@media (max-width: 40rem) {
  table, tbody, tr, th, td { display: block; min-width: 0; }
  thead { display: none; }
  tbody th { position: sticky; top: 0; z-index: 1; max-height: 35vh; overflow: auto; }
  .label { display: block; }
}
"""
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Answer:
    """What came of one prompt with one adapter."""

    text: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


def beginning(title: str, about: str, names: Sequence[str]) -> str:
    """Up to the first row."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>\n"
        f'<table>\n<thead><tr><th scope="col">prompt</th>{heads}</tr></thead>\n<tbody>\n'
    )


def table_row(place: str, prompt: str, answers: Mapping[str, Answer]) -> str:
    """A prompt, and the answers by the names of their columns."""
    cells = "".join(f"<td>{_cell(name, answer)}</td>\n" for name, answer in answers.items())
    asked = f'{_text("text", prompt)}<p class="figures">{escape(place)}</p>'
    return f'<tr>\n<th scope="row">{asked}</th>\n{cells}</tr>\n'


def ending() -> str:
    """After the last row."""
    return "</tbody>\n</table>\n</body>\n</html>\n"


def _cell(name: str, answer: Answer) -> str:
    parts = [f'<div class="label">{escape(name)}</div>']
    if answer.text is not None:
        parts.append(_text("text", answer.text))
    if answer.error is not None:
        parts.append(_text("error", answer.error))
    figures = [answer.finish_reason] if answer.finish_reason else []
    if answer.output_tokens is not None:
        figures.insert(0, f"{answer.prompt_tokens} tokens read, {answer.output_tokens} generated")
    if figures:
        parts.append(f'<p class="figures">{escape(", ".join(figures))}</p>')
    return "".join(parts)


def _text(kind: str, text: str) -> str:
    return f'<div class="{kind}" dir="auto">{escape(text)}</div>'
