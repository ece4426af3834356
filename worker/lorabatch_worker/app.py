"""The worker's Celery app: `celery -A lorabatch_worker.app worker`, or `make_worker_app`.

The module's `app` is built when it is looked up, from the environment; importing the module
starts no server and loads no torch. Raises LoraBatchError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import Celery

from lorabatch.database import connect
from lorabatch.queue import TASK_NAME, make_app
from lorabatch.registry import Registry
from lorabatch.settings import Settings
from lorabatch_worker import transport
from lorabatch_worker.control import adapter_place, warm_adapter
from lorabatch_worker.logs import own_logging
from lorabatch_worker.runner import Runner
from lorabatch_worker.visibility import VisibilityHeartbeat

__all__ = ["WorkerParts", "make_worker_app"]

REMOTE_CONTROL = (adapter_place, warm_adapter)  # Celery knows them by their import


@dataclass(frozen=True)
class WorkerParts:
    """What the pool finds on the app as `app.lorabatch`."""

    settings: Settings
    runner_factory: Callable[[Settings], Runner]


def make_worker_app(
    settings: Settings, runner_factory: Callable[[Settings], Runner] | None = None
) -> Celery:
    """The app that a worker runs. Other tasks may be registered on it and run on threads."""
    if settings.queue not in settings.consume:  # what it sends again, it must drain itself
        settings = settings.model_copy(update={"queue": settings.consume[0]})
    if settings.transport == "atomic":
        transport.use_in_this_process()
    app = make_app(settings)
    app.conf.update(
        worker_pool="lorabatch_worker.pool:EnginePool",
        worker_consumer="lorabatch_worker.consumer:JobConsumer",
        worker_concurrency=settings.max_seqs,
        worker_prefetch_multiplier=settings.lookahead,
        broker_channel_error_retry=True,  # a full broker refuses who comes back
        worker_disable_rate_limits=True,
        worker_disable_prefetch=False,
        worker_enable_prefetch_count_reduction=False,
        broker_connection_max_retries=None,  # for ever: an end would lose what runs
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        redis_socket_timeout=5.0,
        redis_socket_connect_timeout=5.0,
        result_backend_transport_options={
            "retry_policy": {"max_retries": 2, "interval_step": 0.2, "interval_max": 0.5}
        },
    )
    app.lorabatch = WorkerParts(settings, runner_factory or _build_engine)
    app.steps["consumer"].add(VisibilityHeartbeat)
    app.task(
        _generate,
        name=TASK_NAME,
        Request="lorabatch_worker.request:JobRequest",
        acks_late=True,
        acks_on_failure_or_timeout=True,
        reject_on_worker_lost=True,
    )
    return app


def _generate(**job: Any) -> None:
    """Never called: EnginePool gives these messages to the engine."""
    raise RuntimeError(f"{TASK_NAME} runs in lorabatch's EnginePool only, not in this pool")


def _build_engine(settings: Settings) -> Runner:
    from lorabatch_worker.build import build_engine
    from lorabatch_worker.tenant_weights import TenantWeights

    database = connect(settings.resolved_database_url)
    return build_engine(
        settings, Registry(database, settings.base_model), TenantWeights(database).of
    )


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    settings = Settings.load()
    own_logging(settings)
    globals()["app"] = app = make_worker_app(settings)
    return app
