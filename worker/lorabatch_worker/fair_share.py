"""Whose turn it is: deficit round robin between tenants, charged in tokens.

A tenant's charge is the tokens it was given over its weight. When a job begins it is charged for
all that it may take: the part of its prompt that is not cached, and `max_new_tokens`. When it
leaves, what it did not take is given back. In a round every tenant may be charged a quantum for
each unit of weight; who has had it waits for the next round, while the others have not.

A tenant for which nothing waits saves up nothing: when it comes back it is lifted to what the
least served of those that wait was given. What their running jobs may still take is left out
there, so that whoever comes gets places until it holds as many of them.

Each priority has accounts of its own: a higher one goes first without owing for it to lower ones.

Bound: let tenants i and j of one priority, given equally much and running nothing, each have
something waiting that fits from then on. What i is given over its weight never exceeds that of j
by more than

    quantum + largest job of i / weight of i + what j's running jobs may take / weight of j

because i begins a job only in j's round or an earlier one: its charge was less than a quantum above
j's then, and is one job more now; j was given what it was charged then, but for what its running
jobs might still take; and while no job of a tenant begins, its charge does not grow.

Nothing is raised. Not covered: shares among several workers; a tenant whose jobs do not fit (no
slot, no blocks), for which the scheduler has its age cap. Used from the engine's thread; `served`
and `shares` from any.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field

from lorabatch_worker.sequence import Sequence

__all__ = ["FairShare", "alike"]

HALF_LIFE_S = 60.0  # of what counts for `shares`
FORGOTTEN_AFTER_S = 600.0
IDLE_ACCOUNTS = 1000  # at most, whoever makes up names of tenants

_Key = tuple[int, str]  # priority, tenant


@dataclass(eq=False)
class _Account:
    """Of one tenant at one priority. `waiting` and `running` are by sequence."""

    key: _Key
    weight: float = 1.0
    settled: float = 0.0
    """Charged for jobs while they are not running, and lifted: tokens over weight."""
    reserved_tokens: int = 0
    """What the running ones may take."""
    waiting: set[str] = field(default_factory=set)
    running: dict[str, tuple[Sequence, int]] = field(default_factory=dict)
    served_tokens: int = 0
    recent_tokens: float = 0.0
    seen_s: float = 0.0
    """When a job of it left last, and when `recent_tokens` was right."""

    @property
    def charge(self) -> float:
        return self.settled + self.reserved_tokens / self.weight

    @property
    def given(self) -> float:
        """As the charge, of what running jobs took until now."""
        return self.settled + self.unsettled_tokens / self.weight

    @property
    def unsettled_tokens(self) -> int:
        running = list(self.running.values())  # a copy in one go, for other threads
        return sum(_taken(sequence) - sequence.charged_tokens for sequence, _ in running)

    def recent(self, now_s: float) -> float:
        faded: float = self.recent_tokens * 0.5 ** ((now_s - self.seen_s) / HALF_LIFE_S)
        return faded


def alike(tenant: str) -> float:
    """The weight of every tenant, where nobody says otherwise."""
    return 1.0


class FairShare:
    """The accounts of all tenants that have jobs here, and for a while of those that had.

    `weight_of` is asked at every step for each tenant of which something waits: it answers at
    once, with more than 0, and raises nothing."""

    def __init__(self, quantum_tokens: int, weight_of: Callable[[str], float] = alike) -> None:
        self.quantum_tokens = quantum_tokens
        self._weight_of = weight_of
        self._here: dict[_Key, _Account] = {}
        self._idle: OrderedDict[_Key, _Account] = OrderedDict()  # longest idle first
        self._came: set[_Account] = set()  # nothing of them waited at the last step
        self._top = 0.0  # the most that any idle one was given

    @property
    def tenants(self) -> int:
        """How many have jobs here."""
        return len({tenant for _, tenant in self._here})

    # -- what the scheduler tells --------------------------------------------

    def waits(self, sequence: Sequence) -> None:
        key = _key(sequence)
        if key not in self._here:
            self._here[key] = self._idle.pop(key) if key in self._idle else _Account(key)
        account = self._here[key]
        if not account.waiting:
            self._came.add(account)
        account.waiting.add(sequence.key)

    def begins(self, sequence: Sequence) -> None:
        """It has its blocks: charge all that it may take, less what it was charged for before it
        lost its place. What it lost is computed anew at nobody's expense."""
        account = self._here[_key(sequence)]
        tokens = sequence.max_length - sequence.cached_tokens - sequence.charged_tokens
        account.waiting.discard(sequence.key)
        account.running[sequence.key] = sequence, tokens
        account.reserved_tokens += tokens

    def leaves(self, sequence: Sequence) -> None:
        """It waits or runs no more; of one that ran, the charge is what it took."""
        account = self._here[_key(sequence)]
        now_s = time.monotonic()
        account.recent_tokens, account.seen_s = account.recent(now_s), now_s
        if sequence.key in account.waiting:
            account.waiting.remove(sequence.key)
        else:
            self._settle(account, sequence)
        if not (account.waiting or account.running):
            self._rest(account)
        self._forget(now_s - FORGOTTEN_AFTER_S)

    def lift(self) -> None:
        """At every step, before anyone begins: who comes back has saved nothing up."""
        if not self._came:
            return
        came, self._came = self._came, set()
        given = {account: account.given for account in self._here.values()}
        least: dict[int, float] = {}
        for account, tokens in given.items():
            if account.waiting and account not in came:
                priority, _ = account.key
                least[priority] = min(tokens, least.get(priority, tokens))
        # Where nobody waited nobody was kept waiting: all that come begin as equals.
        most = max([self._top, *given.values()])
        for account in came:
            if account.waiting:
                floor = least.get(account.key[0], most)
                account.settled += max(0.0, floor - given[account])

    def in_turn(self, ordered: List[Sequence]) -> Iterator[Sequence]:
        """Waiting sequences, sorted by priority first: of each tenant in this order, and of all
        tenants in the same round. Rounds are looked at anew after every one."""
        lines: dict[_Key, list[int]] = defaultdict(list)  # places in `ordered`, last first
        for place in range(len(ordered) - 1, -1, -1):
            lines[_key(ordered[place])].append(place)
        accounts = {key: self._here[key] for key in lines}  # jobs may leave meanwhile
        for key, account in accounts.items():
            account.weight = self._weight_of(key[1])

        def head(key: _Key) -> tuple[int, float, int, _Key]:
            in_round = accounts[key].charge // self.quantum_tokens
            return -key[0], in_round, lines[key][-1], key

        heads = [head(key) for key in lines]
        heapq.heapify(heads)
        while heads:
            *_, key = heads[0]
            yield ordered[lines[key].pop()]
            if lines[key]:
                heapq.heapreplace(heads, head(key))
            else:
                heapq.heappop(heads)

    # -- for people ----------------------------------------------------------

    def served(self) -> dict[str, int]:
        """Tokens that each tenant was given here, at all priorities, while it is remembered."""
        found: dict[str, int] = defaultdict(int)
        for account in self._accounts():
            found[account.key[1]] += account.served_tokens + account.unsettled_tokens
        return dict(found)

    def shares(self) -> dict[str, float]:
        """Each tenant's part of the tokens of late; those of a minute ago count half."""
        now_s = time.monotonic()
        found: dict[str, float] = defaultdict(float)
        for account in self._accounts():
            found[account.key[1]] += account.recent(now_s) + account.unsettled_tokens
        total = sum(found.values())
        return {tenant: tokens / total for tenant, tokens in found.items()} if total else {}

    # -- inside --------------------------------------------------------------

    def _accounts(self) -> list[_Account]:
        return [*self._here.values(), *self._idle.values()]

    def _settle(self, account: _Account, sequence: Sequence) -> None:
        _, reserved = account.running.pop(sequence.key)
        account.reserved_tokens -= reserved
        taken = _taken(sequence)
        tokens, sequence.charged_tokens = taken - sequence.charged_tokens, taken
        account.settled += tokens / account.weight
        account.served_tokens += tokens
        account.recent_tokens += tokens

    def _rest(self, account: _Account) -> None:
        self._idle[account.key] = self._here.pop(account.key)
        self._top = max(self._top, account.settled)

    def _forget(self, before_s: float) -> None:
        """Accounts that have been idle since then, and the longest idle of too many."""
        while self._idle:
            oldest = next(iter(self._idle.values()))
            if len(self._idle) <= IDLE_ACCOUNTS and oldest.seen_s >= before_s:
                return
            self._idle.popitem(last=False)


def _key(sequence: Sequence) -> _Key:
    job = sequence.claim.job
    return job.priority, job.tenant


def _taken(sequence: Sequence) -> int:
    """Tokens that it was given: of its prompt, but for what was cached when it first ran, and made.
    Where it gave up its place in the middle of its prompt, as far as it ever got."""
    prompt = min(sequence.computed, len(sequence.prompt)) - sequence.cached_tokens
    return max(sequence.charged_tokens, prompt + len(sequence.output))
