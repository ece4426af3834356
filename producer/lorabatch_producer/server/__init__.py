"""The HTTP API: jobs from web apps, and the shapes that existing clients already send."""

from lorabatch_producer.server.app import create_app

__all__ = ["create_app"]
