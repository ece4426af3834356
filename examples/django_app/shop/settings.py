"""One database for Django's tables and lorabatch's, named by LORABATCH_DATABASE_URL."""

import os
from pathlib import Path

from sqlalchemy import make_url

BASE_DIR = Path(__file__).parents[1]
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "only for trying it out")
DEBUG = True
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
INSTALLED_APPS = ["shop"]
MIDDLEWARE = ["django.middleware.csrf.CsrfViewMiddleware"]
ROOT_URLCONF = "shop.urls"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

DATABASE_URL = os.environ.get("LORABATCH_DATABASE_URL", f"sqlite:///{BASE_DIR}/db.sqlite3")
url = make_url(DATABASE_URL)
if url.drivername == "sqlite":
    # lorabatch sets the file to WAL; wait for a writer rather than fail
    OPTIONS = {"timeout": 30, "transaction_mode": "IMMEDIATE"}
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": url.database,
            "OPTIONS": OPTIONS,
        }
    }
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": url.database,
            "USER": url.username,
            "PASSWORD": url.password,
            "HOST": url.query.get("host", url.host),
            "PORT": url.port,
        }
    }

CELERY_BROKER_URL = os.environ.get("LORABATCH_BROKER_URL", "redis://localhost:6379/0")
CELERY_RESULT_BACKEND = f"lorabatch+{DATABASE_URL}"
