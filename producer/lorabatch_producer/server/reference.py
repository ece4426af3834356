"""The page at /docs: the OpenAPI document for people, without anything from elsewhere.

Each operation with its fields, an example that a press sends, and its answers. The page asks for a
key where one is wanted, and keeps it nowhere. Raises nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["page"]

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
code,pre,textarea,input{font:14px/1.4 ui-monospace,monospace}
textarea,input{width:100%;box-sizing:border-box}
pre{background:#8882;padding:.6rem;overflow:auto;max-height:24rem;white-space:pre-wrap}
summary{cursor:pointer}details{border-top:1px solid #8884;padding:.5rem 0}
table{border-collapse:collapse}td{padding:.1rem .8rem .1rem 0;vertical-align:top}
:root{color-scheme:light dark}
"""
SCRIPT = """
document.querySelectorAll("form[data-path]").forEach(form => form.onsubmit = async event => {
  event.preventDefault();
  const headers = {}, key = document.getElementById("key").value.trim();
  if (key) headers["Authorization"] = "Bearer " + key;
  let path = form.dataset.path, body;
  form.querySelectorAll("input").forEach(input => {
    path = path.replace("{" + input.name + "}", encodeURIComponent(input.value));
  });
  const text = form.querySelector("textarea"), shown = form.querySelector("pre");
  if (text) { body = text.value; headers["Content-Type"] = "application/json"; }
  shown.textContent = "...";
  try {
    const answer = await fetch(path, {method: form.dataset.method, headers, body});
    shown.textContent = answer.status + " " + answer.statusText + "\\n" + await answer.text();
  } catch (error) { shown.textContent = String(error); }
});
"""


def page(document: Mapping[str, Any], model: str) -> str:
    """HTML. `model`: one that is there, for the examples."""
    info = document["info"]
    about = "".join(f"<p>{_prose(part)}</p>" for part in info["description"].strip().split("\n\n"))
    rooms = "".join(_room(tag, document, model) for tag in document["tags"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>{about}"
        "<p>The same for programs: <a href=openapi.json>openapi.json</a>.</p>"
        "<p><label>Key, where one is wanted <input id=key type=password autocomplete=off></label>"
        f"</p>{rooms}<script>{SCRIPT}</script></html>"
    )


def _room(tag: Mapping[str, str], document: Mapping[str, Any], model: str) -> str:
    inside = "".join(
        _operation(path, method, operation, model)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if tag["name"] in operation["tags"]
    )
    return f"<h2>{escape(tag['name'])}</h2><p>{_prose(tag['description'])}</p>{inside}"


def _operation(path: str, method: str, operation: Mapping[str, Any], model: str) -> str:
    answers = "".join(
        f"<tr><td>{status}<td>{_prose(answer['description'])}"
        for status, answer in operation["responses"].items()
    )
    fields = "".join(_fields(operation))
    form = _form(path, method, operation, model)
    return (
        f"<details><summary><code>{method.upper()} {escape(path)}</code> "
        f"{escape(operation['summary'])}</summary><p>{_prose(operation['description'])}</p>"
        f"<table>{fields}</table>{form}<table>{answers}</table></details>"
    )


def _fields(operation: Mapping[str, Any]) -> Iterator[str]:
    for field in operation.get("parameters", ()):
        text = _prose(field.get("description", ""))
        yield f"<tr><td><code>{escape(field['name'])}</code><td>{field['in']}<td>{text}"
    for media in operation.get("requestBody", {}).get("content", {}).values():
        schema = media["schema"]
        for name, field in schema.get("properties", {}).items():
            kind = _kind(field) + (", required" if name in schema.get("required", ()) else "")
            about = _prose(field.get("description", ""))
            yield f"<tr><td><code>{escape(name)}</code><td>{kind}<td>{about}"


def _kind(field: Mapping[str, Any]) -> str:
    """What values it has, in short."""
    choices = field.get("anyOf", [field])
    kinds = [kind for one in choices for kind in _listed(one.get("type", "any")) if kind != "null"]
    found: Mapping[str, Any] = next(
        (one for one in choices if "minimum" in one or "maximum" in one), {}
    )
    least, most = found.get("minimum", found.get("exclusiveMinimum")), found.get("maximum")
    bounds = f" {least:,} to {most:,}" if least is not None and most is not None else ""
    return escape(" or ".join(kinds) + bounds)


def _listed(kinds: str | list[str]) -> list[str]:
    return [kinds] if isinstance(kinds, str) else kinds


def _form(path: str, method: str, operation: Mapping[str, Any], model: str) -> str:
    """What sends it; not for files, which a page cannot make up."""
    content = operation.get("requestBody", {}).get("content", {})
    if content and "application/json" not in content:
        return ""
    inputs = "".join(
        f"<label>{escape(field['name'])} <input name='{escape(field['name'])}'></label>"
        for field in operation.get("parameters", ())
        if field["in"] == "path"
    )
    text = ""
    if content:
        shown = escape(json.dumps(_example(content["application/json"]["schema"], model), indent=2))
        text = f"<textarea rows={shown.count(chr(10)) + 1} aria-label=body>{shown}</textarea>"
    return (
        f"<form data-path='{escape(path)}' data-method={method.upper()}>{inputs}{text}"
        "<p><button>Send</button></p><pre aria-live=polite></pre></form>"
    )


def _example(schema: Mapping[str, Any], model: str) -> dict[str, Any]:
    """With a model that is there, instead of an adapter that may not be."""
    example: dict[str, Any] = next(iter(schema.get("examples", ())), {})
    found = {name: value for name, value in example.items() if name != "adapter_id"}
    if "parameters" in found:
        found["parameters"] = _example({"examples": [found["parameters"]]}, model)
    return {**found, "model": model} if "model" in found else found


def _prose(text: str) -> str:
    """Escaped; `code` and **strong** as in the document."""
    parts = escape(text).split("`")
    told = "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
    strong = told.split("**")
    return "".join(f"<strong>{p}</strong>" if i % 2 else p for i, p in enumerate(strong))
