"""Texts as they grow: pieces put together are the text, whatever the tokens and stop strings."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from lorabatch.result import Choice, LikelyToken, Result, Token
from lorabatch.streams import Followed, Piece, entry_of, piece_of
from lorabatch_worker.growing_text import GrowingText, GrowingTexts
from lorabatch_worker.stop import StopWatch, decode, trim
from tests.scheduling import sequence

TEXTS = (
    "Plain words, one after another.",
    "Grüße an alle: 日本語テキスト, עברית, 🙂👩‍👩‍👧‍👦!",
    "  spaces\n\n\tand lines\r\n",
    "a STOP b END c STOPPING",
)


def pieces_of(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    growing = GrowingText(tokenizer, stop)
    return [growing.more(list(ids[: n + 1])) for n in range(len(ids))]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    whole = decode(tokenizer, ids)
    assert whole.startswith("".join(pieces))
    assert len(whole) - len("".join(pieces)) <= 1, "a last character may still be half"
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_make_a_beginning_of_the_text(tokenizer: Any) -> None:
    rng = random.Random(7)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]
        stop = tuple(rng.sample(["e", "th", " a", "ing", "\n"], rng.randrange(3)))
        watch = StopWatch(tokenizer, stop) if stop else None
        for n, token in enumerate(ids):
            if watch is not None and watch.saw(token):
                ids = ids[: n + 1]
                break
        whole = trim(decode(tokenizer, ids), stop)
        followed = Followed()
        for piece in pieces_of(tokenizer, ids, stop):
            followed.take(Piece("j", len(followed.text), piece))
        assert followed.rest(whole) is not None, (ids, stop)


def test_nothing_of_a_stop_string_is_given(tokenizer: Any) -> None:
    ids = tokenizer("one two three four", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(tokenizer, ids, ["three"])) == "one two "
    assert "".join(pieces_of(tokenizer, ids, ["fourteen"])) == "one two thr", "it may yet come"


def test_a_token_at_a_time_is_given_as_it_comes(tokenizer: Any) -> None:
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    assert pieces_of(tokenizer, ids) == [decode(tokenizer, [i]) for i in ids]


def test_many_texts_at_once(tokenizer: Any) -> None:
    """From a thread, in order, and one that fails takes no other along."""
    got: dict[str, Followed] = {name: Followed() for name in "abc"}
    came = threading.Event()

    def on_text(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            got[piece.job_id].take(piece)
        if not came.is_set():
            came.set()
            raise OSError("whoever they are for")

    jobs = {name: sequence(name) for name in "abc"}
    broken = sequence("broken")
    texts = GrowingTexts(lambda one: None if one is broken else tokenizer, on_text)
    texts.start()
    ids = tokenizer("one two three four five", add_special_tokens=False)["input_ids"]
    for token in ids:
        for one in (*jobs.values(), broken):
            one.output.append(token)
            texts.grew(one)
    assert came.wait(20)
    texts.close()
    assert {f.text for f in got.values()} == {decode(tokenizer, ids)}


def test_a_follower_gets_each_character_once() -> None:
    followed = Followed()
    assert followed.take(Piece("j", 0, "abc")) == "abc"
    assert followed.take(Piece("j", 0, "abc")) == "", "the same again"
    assert followed.take(Piece("j", 1, "bcde")) == "de", "of another run"
    assert followed.take(Piece("j", 9, "z")) == "", "after a gap"
    assert followed.rest("abcdefg") == "fg"
    assert Followed().rest("abc") == "abc"


def token(number: int) -> Token:
    return Token(token_id=number, text=str(number), logprob=-1.5, top=(LIKELY,) * (number % 2))


LIKELY = LikelyToken(token_id=7, text="\ufffd", logprob=-0.5, utf8=(0xC3,))


def test_a_follower_gets_each_token_once() -> None:
    tokens = tuple(map(token, range(6)))
    followed = Followed()
    assert followed.tokens(Piece("j", 0, "ab", 0, tokens[:2])) == tokens[:2]
    assert followed.tokens(Piece("j", 0, "ab", 0, tokens[:2])) == (), "the same again"
    assert followed.tokens(Piece("j", 1, "bc", 1, tokens[1:3])) == (tokens[2],)
    assert followed.tokens(Piece("j", 5, "f", 4, tokens[4:5])) == (), "after a gap"
    choice = Choice(text="abcdef", token_ids=tuple(range(6)), tokens=tokens)
    whole = Result(job_id="j", tenant="t", adapter_id=None, state="succeeded", choices=(choice,))
    assert followed.rest_of_tokens(whole) == tokens[3:]
    failed = Result(job_id="j", tenant="t", adapter_id=None, state="failed")
    assert followed.rest_of_tokens(failed) == ()


def test_a_piece_is_the_same_in_the_broker() -> None:
    for piece in (Piece("j", 3, "é"), Piece("j", 3, "é", 2, (token(1), token(2)))):
        sent = entry_of(piece)
        read = {
            name.encode(): value if isinstance(value, bytes) else str(value).encode()
            for name, value in sent.items()
        }
        assert piece_of("j", read) == piece


def test_who_comes_again_gets_what_is_new() -> None:
    followed = Followed(had=4)
    assert followed.take(Piece("j", 0, "abc")) == ""
    assert followed.take(Piece("j", 3, "def")) == "ef"
    assert Followed(had=4).rest("abcdef") == "ef"


def test_another_text_is_told_apart() -> None:
    followed = Followed()
    followed.take(Piece("j", 0, "abc"))
    assert followed.rest("abX") is None
