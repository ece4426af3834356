"""What enqueues jobs and reads them back: client, bulk files, reports and the command line.

Light: importing this loads neither torch nor transformers.
"""

from lorabatch_producer.aio import AsyncProducer
from lorabatch_producer.client import Producer
from lorabatch_producer.sending import NotSent

__all__ = ["AsyncProducer", "NotSent", "Producer"]
