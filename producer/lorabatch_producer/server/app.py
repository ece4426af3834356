"""The application: its routes, and what they share for as long as it runs.

    uvicorn.run(create_app(Settings.load()))

Opens database and broker when it starts. Loads no torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

import lorabatch
from lorabatch import Settings
from lorabatch_producer.server import (
    health,
    jobs,
    metrics,
    openai,
    openai_batches,
    openai_files,
    openai_usage,
    tgi,
    webhooks,
)
from lorabatch_producer.server.batch_work import BatchWork
from lorabatch_producer.server.body_limit import BodyLimit
from lorabatch_producer.server.desk import Desk
from lorabatch_producer.server.document import ABOUT, document
from lorabatch_producer.server.keyed import Keyed
from lorabatch_producer.server.metrics import Counted, Numbers
from lorabatch_producer.server.models import Models
from lorabatch_producer.server.openai_batches import BATCHES_PATH, NEW_BATCH_BYTES
from lorabatch_producer.server.openai_files import FILES_PATH
from lorabatch_producer.server.problems import answer_errors
from lorabatch_producer.server.rate_gate import RateHeaders
from lorabatch_producer.server.reference import page
from lorabatch_producer.server.uploads import OVERHEAD_BYTES
from lorabatch_producer.webhook_sender import WebhookSender

__all__ = ["create_app"]


def create_app(settings: Settings | None = None) -> FastAPI:
    """For one process. Raises SettingsError."""
    known = settings or Settings.load()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            Desk(known) as desk,
            BatchWork(desk.producer) as work,
            WebhookSender(desk.ledger, known),
        ):
            app.state.desk, app.state.batch_work = desk, work
            yield

    app = FastAPI(
        title="lorabatch",
        version=lorabatch.__version__,
        description=ABOUT,
        lifespan=lifespan,
        docs_url=None,  # theirs load scripts from elsewhere
        redoc_url=None,
    )
    most = known.http_max_body_bytes
    others = {
        FILES_PATH: known.http_max_file_bytes + OVERHEAD_BYTES,
        BATCHES_PATH: min(most, NEW_BATCH_BYTES),
    }
    app.add_middleware(BodyLimit, limit_bytes=most, others=others, read_s=known.http_read_s)
    app.add_middleware(RateHeaders)
    app.add_middleware(Keyed, settings=known)
    app.state.numbers = Numbers()
    app.add_middleware(Counted, numbers=app.state.numbers)  # the last one is the first to be asked
    answer_errors(app)
    app.openapi = partial(document, app, known.http_keys != "off")  # type: ignore[method-assign]
    openai_rooms = (openai, openai_files, openai_batches, openai_usage)
    for room in (health, metrics, jobs, *openai_rooms, tgi, webhooks):
        app.include_router(room.router)

    @app.get("/docs", include_in_schema=False, response_class=HTMLResponse)
    def docs() -> str:
        desk: Desk = app.state.desk
        model = Models(desk.ledger.engine, desk.settings).base().name
        return page(app.openapi(), model)

    return app
