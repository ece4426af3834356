"""Adapters that must be refused: what is wrong, how to make one, the error and words in it.

All are made from one good adapter (`write`) for the layers in TARGET.
"""

from __future__ import annotations

from tests.bad_adapters.ends import ENDS_ROWS
from tests.bad_adapters.good import TARGET, Q, V, good_tensors, key, write
from tests.bad_adapters.making import Bad
from tests.bad_adapters.settings import SETTINGS_ROWS
from tests.bad_adapters.templates import TEMPLATES_ROWS
from tests.bad_adapters.tokens import TOKENS_ROWS
from tests.bad_adapters.weights import WEIGHTS_ROWS

__all__ = ["BAD", "TARGET", "Bad", "Q", "V", "good_tensors", "key", "write"]

BAD: list[Bad] = [*SETTINGS_ROWS, *WEIGHTS_ROWS, *ENDS_ROWS, *TOKENS_ROWS, *TEMPLATES_ROWS]
