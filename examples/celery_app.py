"""Any Celery app: it knows the task's name, and nothing of lorabatch is installed where it runs.

    pip install 'celery[redis]'
    BROKER_URL=redis://... python celery_app.py         # `lorabatch status --urls` tells the URL

Needs a running lorabatch-worker on the same broker, with results there, as they are by default
(LORABATCH_RESULT_BACKEND_URL unset). What a job may hold is what `Job` has;
whatever is misspelt fails the job and says so.
"""

from __future__ import annotations

import os

from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
WAIT_S = 120
app = Celery("shop", broker=BROKER_URL, backend=BROKER_URL)


def generate(prompt: str, adapter_id: str | None = None, max_new_tokens: int = 64) -> AsyncResult:
    """Put a job into the queue. Its id is the result's id."""
    return app.send_task(
        "lorabatch.generate",
        kwargs={
            "messages": [{"role": "user", "content": prompt}],
            "adapter_id": adapter_id,
            "tenant": "shop",
            "sampling_params": {"max_new_tokens": max_new_tokens},
        },
    )


def main() -> None:
    job = generate("What is rain?", adapter_id=os.environ.get("ADAPTER_ID"))
    result = job.get(timeout=WAIT_S)
    print(f"{result['text']!r}, {result['usage']['output_tokens']} tokens")
    print("read again by its id:", AsyncResult(job.id, app=app).state)

    long = generate("Tell me everything about the sea.", max_new_tokens=1500)
    long.revoke(terminate=True)  # whether it waits or runs
    try:
        long.get(timeout=WAIT_S)
    except TaskRevokedError:
        print("the second one was cancelled")


if __name__ == "__main__":
    main()
