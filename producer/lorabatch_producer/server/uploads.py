"""A multipart upload on its way to the disk, a piece at a time, however large it is.

Nothing that the client says becomes part of a path. Raises HTTPException.
"""

from __future__ import annotations

import os
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

__all__ = ["OVERHEAD_BYTES", "Upload"]

FIELD_BYTES = 1024
FIELDS = 8
FILENAME_CHARS = 255
OVERHEAD_BYTES = 64 * 1024  # of a body, beyond its file


class Upload:
    """Fields by their names, and the part `file` in a new file at `path`, which is nobody else's.
    Blocks as disks do."""

    def __init__(self, path: Path, content_type: str, limit_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size_bytes = 0
        self._path, self._limit_bytes = path, limit_bytes
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise HTTPException(400, "content-type: wanted multipart/form-data with a boundary")
        self._parser = _parser(self, boundary)
        self._name, self._value, self._header = "", b"", (b"", b"")
        self._disposition = b""
        self._over = False
        self._mark: Path | None = None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = path.open("xb")

    def feed(self, some: bytes) -> None:
        try:
            self._parser.write(some)
        except FormParserError:
            raise HTTPException(400, "the body is not valid multipart/form-data") from None

    def keep(self, path: Path) -> None:
        """Once all has come: the file appears at `path`, complete and on the disk, with a mark
        beside it until it is `noted`: who finds the mark later knows that nobody may know the file.
        """
        if not self._over:
            raise HTTPException(400, "the body ends in the middle of a part; send it again")
        if self.filename is None:
            raise HTTPException(400, "file: missing; send it as a part with a filename")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._mark = marked(path)
        self._mark.touch()
        self._path.replace(path)

    def noted(self) -> None:
        """The database has it, too."""
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)

    def close(self) -> None:
        """What was not kept is gone."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    # -- what the parser calls -------------------------------------------------

    def on_part_begin(self) -> None:
        self._value = self._disposition = b""
        self._header = (b"", b"")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0] + data[start:end], self._header[1])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = (self._header[0], self._header[1] + data[start:end])

    def on_header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = (b"", b"")

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name in self.fields or (self._name == "file" and self.filename is not None):
            raise HTTPException(400, f"{self._name[:64]}: given twice; give it once")
        if self._name == "file":
            self.filename = shown_filename(options.get(b"filename", b""))
        elif len(self.fields) == FIELDS:
            raise HTTPException(400, f"wanted {FIELDS} fields at most beside the file")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.size_bytes += end - start
            if self.size_bytes > self._limit_bytes:
                raise HTTPException(413, f"file: wanted {self._limit_bytes} bytes at most")
            self._file.write(memoryview(data)[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > FIELD_BYTES:
            raise HTTPException(400, f"{self._name[:64]}: wanted {FIELD_BYTES} bytes at most")

    def on_part_end(self) -> None:
        if self._name != "file":
            self.fields[self._name] = self._value.decode(errors="replace")

    def on_end(self) -> None:
        self._over = True


def _parser(upload: Upload, boundary: bytes) -> MultipartParser:
    return MultipartParser(
        boundary,
        {
            "on_part_begin": upload.on_part_begin,
            "on_header_field": upload.on_header_field,
            "on_header_value": upload.on_header_value,
            "on_header_end": upload.on_header_end,
            "on_headers_finished": upload.on_headers_finished,
            "on_part_data": upload.on_part_data,
            "on_part_end": upload.on_part_end,
            "on_end": upload.on_end,
        },
    )


def marked(path: Path) -> Path:
    """The mark of a file that may not be in the database."""
    return path.with_name(f".{path.name}.kept")


def shown_filename(given: bytes) -> str:
    """The last part of what a client calls its file, as one printable line."""
    last = given.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    plain = "".join(char if char.isprintable() else "_" for char in last)
    return plain[:FILENAME_CHARS] or "file"
