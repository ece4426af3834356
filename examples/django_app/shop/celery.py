"""The Celery app, and lorabatch's task as an object to call `delay` on."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")


@app.task(name="lorabatch.generate")
def generate(**job: Any) -> None:
    """Only the name counts: lorabatch's workers have the task itself."""
    raise NotImplementedError("run lorabatch-worker; a worker of this app cannot generate")
