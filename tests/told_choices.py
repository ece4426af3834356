"""Results with several texts and log probabilities, as a worker would make them of a job."""

from __future__ import annotations

from lorabatch import Result, Usage
from lorabatch.candidates import seed_of
from lorabatch.ledger import Claim
from lorabatch.result import Choice, LikelyToken, Token
from tests.played_worker import succeeds

END = Token(token_id=0, text="<end>", logprob=-0.25, special=True)
PROMPT_TOKENS = 5


def told(claim: Claim) -> Result:
    """Text `number` says "é N": an é in two tokens, and is less likely than the one after it."""
    params = claim.job.sampling_params
    choices = tuple(_choice(claim, number) for number in range(params.n))
    discarded = tuple((9, 9) for _ in range(params.candidates - params.n))
    return succeeds(
        claim,
        text=choices[0].text,
        token_ids=choices[0].token_ids,
        choices=choices if params.n > 1 or params.logprobs else None,
        discarded=discarded or None,
        usage=Usage(prompt_tokens=PROMPT_TOKENS, output_tokens=4 * params.n + 2 * len(discarded)),
    )


def _choice(claim: Claim, number: int) -> Choice:
    params = claim.job.sampling_params
    value = -2.0 + number / 4
    top = [LikelyToken(token_id=3 + i, text=f" {i}", logprob=-i / 2) for i in range(1, 21)]
    tokens = (
        Token(token_id=1, text="\ufffd", utf8=(0xC3,), logprob=value),
        Token(token_id=2, text="\ufffd", utf8=(0xA9,), logprob=value),
        Token(token_id=3, text=f" {number}", logprob=value, top=tuple(top[: params.top_logprobs])),
        END,
    )
    return Choice(
        text=f"é {number}",
        token_ids=tuple(token.token_id for token in tokens),
        finish_reason="length" if number else "eos_token",
        seed=seed_of(claim.job.seed, number),
        tokens=tokens if params.logprobs else None,
    )
