"""Stop strings: found at the first token after which the whole text holds one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorabatch_worker.stop import StopWatch, decode, trim

SPECIAL = range(17)
PIECES = [
    "a",
    "b",
    "ab",
    " ",
    "\n",
    "STOP",
    "é",
    "€",
    "😀",
    "👩‍👩‍👧",
    "```",
    "</s>",
    "日本",
    ".",
    "The end",
]

texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), st.text(max_size=30))
relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def first_match(tokenizer: Any, ids: list[int], stop: list[str]) -> int | None:
    """The slow way: decode everything again at every token."""
    for end in range(1, len(ids) + 1):
        if any(s in decode(tokenizer, ids[:end]) for s in stop):
            return end
    return None


def watched(tokenizer: Any, ids: list[int], stop: list[str]) -> int | None:
    watch = StopWatch(tokenizer, stop)
    return next((end for end, token in enumerate(ids, 1) if watch.saw(token)), None)


@relaxed
@given(data=st.data(), text=texts)
def test_fires_where_the_whole_text_first_holds_a_stop(
    tokenizer: Any, data: st.DataObject, text: str
) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = decode(tokenizer, ids)
    inside = (
        st.tuples(st.integers(0, max(0, len(shown) - 1)), st.integers(1, 6))
        .map(lambda cut: shown[cut[0] : cut[0] + cut[1]])
        .filter(bool)
    )
    some = st.one_of(inside, st.sampled_from(PIECES)) if shown else st.sampled_from(PIECES)
    stop = data.draw(st.lists(some, min_size=1, max_size=3))
    assert watched(tokenizer, ids, stop) == first_match(tokenizer, ids, stop)


@relaxed
@given(ids=st.lists(st.integers(0, 49_151) | st.integers(0, 300), max_size=30), data=st.data())
def test_fires_in_any_run_of_tokens_broken_bytes_and_special_ones_included(
    tokenizer: Any, ids: list[int], data: st.DataObject
) -> None:
    shown = decode(tokenizer, ids) or "x"
    at = data.draw(st.integers(0, len(shown) - 1))
    stop = [shown[at : at + data.draw(st.integers(1, 8))]]
    assert watched(tokenizer, ids, stop) == first_match(tokenizer, ids, stop)


def test_a_character_split_over_tokens_fires_at_its_last_token(tokenizer: Any) -> None:
    ids = tokenizer("so 👩‍👩‍👧 is", add_special_tokens=False)["input_ids"]
    whole = next(n for n in range(1, len(ids) + 1) if "👧" in decode(tokenizer, ids[:n]))
    assert len(ids) > 6
    assert watched(tokenizer, ids, ["👧"]) == whole


@pytest.mark.parametrize("between", [list(SPECIAL), [11] * 3, [2], [60_000] * 3])
def test_tokens_without_text_inside_a_match_do_not_hide_it(
    tokenizer: Any, between: list[int]
) -> None:
    one, other = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("##", "!!"))
    ids = [*one, *between, *other]
    assert "#!" in decode(tokenizer, ids)
    assert watched(tokenizer, ids, ["#!"]) == first_match(tokenizer, ids, ["#!"])


def test_a_stop_string_that_spells_a_special_token_does_not_match_the_token(tokenizer: Any) -> None:
    assert watched(tokenizer, [2, 2, 2], ["<|im_end|>"]) is None
    assert first_match(tokenizer, [2, 2, 2], ["<|im_end|>"]) is None


def test_a_stop_of_many_tokens_is_found_at_its_last_one(tokenizer: Any) -> None:
    stop = "an end marker that spans quite a number of tokens, 256 characters at most"
    ids = tokenizer("Well: " + stop + " and on", add_special_tokens=False)["input_ids"]
    end = watched(tokenizer, ids, [stop])
    assert end is not None
    assert decode(tokenizer, ids[:end]).endswith(stop)
    assert stop not in decode(tokenizer, ids[: end - 1])


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("aaab", ["aab", "ab"], "a"),
        ("stop", ["stop"], ""),
        ("naïve 😀 end", ["😀"], "naïve "),
    ],
)
def test_trim_cuts_before_the_earliest_stop(text: str, stop: list[str], wanted: str) -> None:
    assert trim(text, stop) == wanted
