"""`lorabatch enqueue`, `result`, `cancel`: single jobs."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from lorabatch import Job, Result
from lorabatch.errors import JobNotFound, LoraBatchError
from lorabatch_producer.client import Producer
from lorabatch_producer.fields import make_job
from lorabatch_producer.sending import NotSent
from lorabatch_producer.services import NO_WORKER, answering
from lorabatch_producer.waiting import Watch, succeeded

__all__ = ["cancel", "enqueue", "result"]

QUIET_S = 4.0
Adapter = Annotated[
    str | None, typer.Option(help="Adapter id; without one the base model answers.")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")]
Raw = Annotated[bool, typer.Option("--raw", help="The prompt as it is, not as a chat message.")]
Queue = Annotated[str | None, typer.Option(help="Whose workers run it, with their base model.")]

Webhook = Annotated[str | None, typer.Option(help="URL that is told of its end.")]
Priority = Annotated[int, typer.Option(help="Higher runs first, -100 to 100.")]
System = Annotated[str | None, typer.Option(help="A system message before the prompt.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SAMPLING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("seed", "stop"),
)


def enqueue(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    adapter: Adapter = None,
    tenant: Annotated[str, typer.Option(help="Who it is billed to.")] = "default",
    max_new_tokens: Annotated[int | None, typer.Option(help="[default: 256]")] = None,
    temperature: Annotated[float | None, typer.Option(help="[default: 0, greedy]")] = None,
    top_k: Annotated[int | None, typer.Option(help="[default: 0, all]")] = None,
    top_p: Annotated[float | None, typer.Option(help="[default: 1]")] = None,
    min_p: Annotated[float | None, typer.Option(help="[default: 0]")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="[default: 1]")] = None,
    seed: Annotated[int | None, typer.Option(help="[default: from the job id]")] = None,
    stop: Stop = None,
    system: System = None,
    raw: Raw = False,
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same job once.")] = None,
    queue: Queue = None,
    priority: Priority = 0,
    webhook: Webhook = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait and print the text.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait at most.")] = None,
    as_json: AsJson = False,
) -> None:
    """Enqueue one prompt; print the job's id, or with --wait the text."""
    given = locals()
    if timeout is not None and not wait:
        raise typer.BadParameter("is for --wait: give that, too", param_hint="--timeout")
    asked = {
        **_prompt(prompt, system, raw),
        **{name: given[name] for name in SAMPLING if given[name] not in (None, [])},
        **{name: given[name] for name in ("tenant", "priority", "webhook")},
        **{"adapter_id": adapter, "idempotency_key": key},
    }
    _enqueue(make_job(asked), queue, wait, timeout, as_json)


def _prompt(prompt: str, system: str | None, raw: bool) -> dict[str, Any]:
    if raw and system is not None:
        raise typer.BadParameter("--system needs a chat: leave --raw out")
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty; give it some text")
    if raw:
        return {"prompt": prompt}
    turns = [{"role": "system", "content": system}] if system is not None else []
    return {"messages": [*turns, {"role": "user", "content": prompt}]}


def _enqueue(
    job: Job, queue: str | None, wait: bool, timeout_s: float | None, as_json: bool
) -> None:
    with Producer() as producer:
        try:
            job_id = producer.enqueue(job, queue=queue)
        except NotSent as error:
            if not wait:
                typer.echo(error.job_ids[0])
                raise
            job_id = error.job_ids[0]
            typer.secho(str(error), err=True, fg="yellow")
        if not wait:
            typer.echo(json.dumps({"job_id": job_id}) if as_json else job_id)
            return
        started = time.monotonic()
        try:
            found = _wait(producer, job_id, timeout_s)
        except KeyboardInterrupt:
            typer.echo(
                f"\ninterrupted; the job goes on: `lorabatch result {job_id}`, or "
                f"`lorabatch cancel {job_id}`",
                err=True,
            )
            raise typer.Exit(130) from None
        _print(found, as_json, time.monotonic() - started)


def _wait(producer: Producer, job_id: str, timeout_s: float | None) -> Result:
    """Wait; after a few quiet seconds look once whether anybody works."""
    watch = Watch(producer.ledger, [job_id], timeout_s)
    started, asked = time.monotonic(), False
    while not (found := watch.look()):
        if not asked and time.monotonic() - started > QUIET_S:
            asked = True
            queued = producer.ledger.states([job_id])[job_id] == "queued"
            if queued and not answering(producer.app()):
                typer.secho(NO_WORKER, err=True, fg="yellow")
        time.sleep(watch.pause_s())
    return found[0]


def _print(found: Result, as_json: bool, waited_s: float | None = None) -> None:
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        if found.state != "succeeded":
            raise typer.Exit(2)
        return
    succeeded(found)
    typer.echo(found.text)
    usage = found.usage
    seconds = "" if waited_s is None else f", {waited_s:.1f} s"
    typer.secho(
        f"adapter {found.adapter_id or '(base model)'}, {usage.prompt_tokens} + "
        f"{usage.output_tokens} tokens{seconds}",
        err=True,
        dim=True,
    )


def result(
    job_id: str, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Print what a job ended as."""
    with Producer() as producer:
        found = producer.result(job_id)
        if found is None:
            state = producer.ledger.states([job_id])[job_id]
            raise LoraBatchError(f"job {job_id!r} has no result yet: it is {state}")
        _print(found, as_json)


def cancel(job_ids: Annotated[list[str], typer.Argument(metavar="JOB_ID...")]) -> None:
    """Cancel jobs; a running one ends at its next step."""
    with Producer() as producer:
        unknown = set(job_ids) - set(producer.ledger.states(job_ids))
        for job_id, state in producer.cancel([i for i in job_ids if i not in unknown]).items():
            now = "asked to stop" if state == "running" else state
            typer.echo(f"{job_id} {now}")
    if unknown:
        raise JobNotFound(f"{', '.join(sorted(unknown))}: no such job in this ledger")
