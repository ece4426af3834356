"""What producer and worker agree on: job and result, queue, settings, tables, ledger, errors.

Light: importing this loads neither torch nor transformers.
"""

from lorabatch.job import ChatMessage, Job, MergedAdapters, SamplingParams
from lorabatch.ledger import Ledger
from lorabatch.result import ErrorInfo, Result, Usage
from lorabatch.settings import Settings

__version__ = "0.1.0"
__all__ = [
    "ChatMessage",
    "ErrorInfo",
    "Job",
    "Ledger",
    "MergedAdapters",
    "Result",
    "SamplingParams",
    "Settings",
    "Usage",
]
