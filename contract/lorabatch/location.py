"""Where an adapter's files are: a local folder, the Hub at a revision, or an S3 bucket.

`Location.parse` reads what people write; `str` gives the one text that is stored and that parses
back to the same: `/abs/path`, `hub:OWNER/NAME@rev`, `s3://bucket/prefix`. Raises ValueError with a
sentence that repeats no password. `AdapterSource` is one entry of LORABATCH_ADAPTERS: a name and a
location. Does not cover: whether anything is there (the worker's sources).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict

from lorabatch.fields import ADAPTER_PATTERN

__all__ = ["AdapterSource", "Location", "is_path", "public_name"]

PATH_STARTS = ("/", "./", "../", "~")
SCHEMES = ("file:", "hub:", "s3:")
REVISION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_./-]*"
COMMIT_PATTERN = r"[0-9a-f]{40}"
BUCKET_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]"


@dataclass(frozen=True)
class Location:
    """`place`: an absolute path, a Hub id, or a bucket. `revision` is the Hub's (None: its default
    branch), `prefix` is S3's ("": the whole bucket)."""

    kind: Literal["folder", "hub", "s3"]
    place: str
    revision: str | None = None
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        if not text or not text.isprintable():
            raise ValueError(
                f"{text!r}: wanted a path, OWNER/NAME[@revision] or s3://bucket/prefix"
            )
        if text.startswith("s3:"):
            return cls._s3(text)
        if text.startswith("file:"):
            return cls._file(text)
        if text.startswith(PATH_STARTS) or text in (".", ".."):
            return cls._folder(text, text)
        return cls._hub(text)

    @classmethod
    def _folder(cls, path: str, text: str) -> Self:
        try:
            return cls("folder", str(Path(path).expanduser().resolve()))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{text!r}: not a path here: {error}") from None

    @classmethod
    def _file(cls, text: str) -> Self:
        url = urlsplit(text)
        if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
            raise ValueError(f"{_shown(text)}: wanted file:///absolute/path on this machine")
        return cls._folder(
            unquote(text.removeprefix("file:").removeprefix(f"//{url.netloc}")), text
        )

    @classmethod
    def _hub(cls, text: str) -> Self:
        name, at, revision = text.removeprefix("hub:").partition("@")
        owned = "/" in name or text.startswith("hub:")
        if not re.fullmatch(ADAPTER_PATTERN, name) or not owned:
            raise ValueError(
                f"{_shown(text)} is neither a folder (./NAME), a Hub id OWNER/NAME[@revision] "
                "nor s3://bucket/prefix"
            )
        if at and not is_revision(revision):
            raise ValueError(f"{text!r}: {revision!r} is not a revision")
        return cls("hub", name, revision if at else None)

    @classmethod
    def _s3(cls, text: str) -> Self:
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not text.startswith("s3://") or not re.fullmatch(BUCKET_PATTERN, bucket):
            raise ValueError(
                f"{_shown(text)}: wanted s3://bucket/prefix, without credentials; those come from "
                "AWS_ACCESS_KEY_ID and the other AWS_* variables"
            )
        if prefix and {"", ".", ".."} & set(prefix.split("/")):
            raise ValueError(f"{text!r}: the prefix holds an empty, '.' or '..' part")
        return cls("s3", bucket, prefix=prefix)

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"hub:{self.place}" + (f"@{self.revision}" if self.revision else "")
        if self.kind == "s3":
            return f"s3://{self.place}" + (f"/{self.prefix}" if self.prefix else "")
        return self.place

    @property
    def pinned(self) -> bool:
        """Whether it is the Hub at a commit, whose files never change."""
        return self.kind == "hub" and bool(re.fullmatch(COMMIT_PATTERN, self.revision or ""))


class AdapterSource(BaseModel):
    """One entry of LORABATCH_ADAPTERS: `id`, `id@rev`, `name=path`, `name=id@rev` or
    `name=s3://bucket/prefix`. `location` is a path, a Hub id or an s3:// URL."""

    model_config = ConfigDict(frozen=True)

    name: str
    location: str
    revision: str | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        name, equals, location = entry.partition("=")
        location = location if equals else name
        revision = None
        local = is_path(location)
        if not local and (location.startswith(SCHEMES) or "://" in location):
            return cls._of_scheme(entry, name if equals else None, location)
        if not local and "@" in location:
            location, _, revision = location.partition("@")
        if not equals:
            name = location
        if not equals and local:
            raise ValueError(f"{entry!r} is a path without a name; write NAME={entry}")
        if not re.match(ADAPTER_PATTERN, name):
            raise ValueError(
                f"{entry!r}: the name {name!r} may hold letters, digits, '_', '.', '-' "
                "and one '/' between two of them"
            )
        if not local and not re.match(ADAPTER_PATTERN, location):
            raise ValueError(f"{entry!r}: {location!r} is neither a folder nor a Hub id")
        if revision is not None and not is_revision(revision):
            raise ValueError(f"{entry!r}: {revision!r} is not a revision")
        return cls(name=name, location=location, revision=revision)

    @classmethod
    def _of_scheme(cls, entry: str, name: str | None, text: str) -> Self:
        where = Location.parse(text)
        if name is None or not re.fullmatch(ADAPTER_PATTERN, name):
            raise ValueError(f"{entry!r}: a name is wanted before it; write NAME={text}")
        location = str(where) if where.kind == "s3" else where.place
        return cls(name=name, location=location, revision=where.revision)

    @property
    def where(self) -> Location:
        """As sources take it. A relative folder is that of the current folder: ask at the start."""
        if self.location.startswith("s3:"):
            return Location.parse(self.location)
        if is_path(self.location):
            return Location("folder", str(Path(self.location).expanduser().resolve()))
        return Location("hub", self.location, self.revision)


def is_path(location: str) -> bool:
    """Whether a location is meant as a folder: it starts like a path, or is one."""
    return location.startswith(PATH_STARTS) or Path(location).is_dir()


def public_name(model: str) -> str:
    """A base model's name as everybody may see it: without folder or revision."""
    return model.rstrip("/").rpartition("/")[2] if is_path(model) else model.partition("@")[0]


def is_revision(text: str) -> bool:
    """A branch, tag, commit or ref. As in git without '..', which would leave a folder of refs."""
    return bool(re.fullmatch(REVISION_PATTERN, text)) and ".." not in text


def _shown(text: str) -> str:
    """For an error: without a password."""
    return repr(re.sub(r"(?<=:)(//)?[^/@\s]*:[^@\s]*@", r"\1***@", text))
