"""A Flask app that asks for texts and is told of them: no request waits for a job.

    export WEBHOOK_URL=https://shop.example/hook
    export WEBHOOK_SECRET=$(lorabatch webhooks secret create --tenant shop)
    flask --app examples/flask_webhook/app.py run

Database and broker are lorabatch's settings, as for every producer. A real app keeps answers where
they survive it; here they are in memory.
"""

from __future__ import annotations

import os

from flask import Flask, abort, jsonify, request
from flask.typing import ResponseReturnValue

from lorabatch.errors import InvalidJob, NotVerified, QueueFull
from lorabatch_producer import NotSent, Producer
from lorabatch_producer.webhooks import ID, verify

TENANT = "shop"
app = Flask(__name__)
producer = Producer()
answers: dict[str, dict[str, object]] = {}
seen: set[str] = set()


@app.post("/ask")
def ask() -> ResponseReturnValue:
    """Accept a question and answer at once, with the id of its job."""
    try:
        job_id = producer.enqueue(
            tenant=TENANT,
            prompt=str(request.form.get("prompt", "")),
            adapter_id=request.form.get("adapter_id"),
            webhook=os.environ["WEBHOOK_URL"],
        )
    except NotSent as error:  # accepted all the same: who asks again would have it twice
        (job_id,) = error.job_ids
    except InvalidJob as error:
        return jsonify(error=str(error)), 422
    except QueueFull:
        return jsonify(error="too many texts wait"), 503, {"Retry-After": "5"}
    return jsonify(job_id=job_id), 202


@app.post("/hook")
def hook() -> ResponseReturnValue:
    """Hear of the end of a job. What is answered with 2xx does not come again; anything else does,
    so one that was seen is answered alike and changes nothing."""
    try:
        event = verify(os.environ["WEBHOOK_SECRET"], request.headers, request.get_data())
    except NotVerified as error:
        app.logger.warning("webhook refused: %s", error)
        return "", 401
    if request.headers[ID] not in seen:
        data = event["data"]
        answers[data["job_id"]] = {"type": event["type"], "text": data["text"]}
        seen.add(request.headers[ID])
    return "", 204


@app.get("/answers/<job_id>")
def answer(job_id: str) -> ResponseReturnValue:
    """What has come, or 404 as long as nothing has."""
    if job_id not in answers:
        abort(404)
    return jsonify(answers[job_id])
