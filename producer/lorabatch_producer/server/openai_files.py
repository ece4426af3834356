"""OpenAI's files: what batches are made from, and what comes out of them.

A file's content lies in one folder under its id, whatever its owner calls it. Another tenant's file
is one that is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lorabatch.errors import shown
from lorabatch.files import Files, new_file_id
from lorabatch_producer.server.caller import Caller, caller_of
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.server.paging import Page, page_of
from lorabatch_producer.server.uploads import Upload

__all__ = ["FILES_PATH", "router"]

FILES_PATH = "/v1/files"
EXPIRES_FIELDS = ("expires_after[anchor]", "expires_after[seconds]")
EXPIRES_S = range(3600, 2_592_000 + 1)
FORM = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {
        "purpose": {"type": "string", "enum": ["batch"]},
        "file": {"type": "string", "format": "binary"},
        EXPIRES_FIELDS[0]: {"type": "string", "enum": ["created_at"]},
        EXPIRES_FIELDS[1]: {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
    "additionalProperties": False,
}
router = APIRouter(prefix=FILES_PATH, tags=["files"])

TheDesk = Annotated[Desk, Depends(desk_of)]
TheCaller = Annotated[Caller, Depends(caller_of)]


class FileObject(BaseModel):
    """A file, without its content. Times: seconds UTC."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post(
    "",
    summary="Upload a file",
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}
    },
)
async def create(request: Request, desk: TheDesk, caller: TheCaller) -> FileObject:
    """Store a JSONL file to make a batch of: it is on the disk when this answers."""
    folder, file_id = desk.settings.files_folder, new_file_id()
    kind, limit = request.headers.get("content-type", ""), desk.settings.http_max_file_bytes
    upload = await desk.call(Upload, folder / f".{file_id}.new", kind, limit)
    try:
        async for some in request.stream():
            await desk.call(upload.feed, some)
        expires_after_s = _checked(upload.fields)
        await desk.call(upload.keep, folder / file_id)
    except ClientDisconnect:
        raise HTTPException(400, "the client went away before all had come") from None
    finally:
        await desk.call(upload.close)
    name, size = upload.filename or "", upload.size_bytes
    files = Files(desk.ledger.engine)
    row = await desk.call(
        files.add, file_id, caller.tenant, "batch", name, size, expires_after_s=expires_after_s
    )
    await desk.call(upload.noted)
    return _object(row)


@router.get("", summary="List files")
async def list_files(
    desk: TheDesk,
    caller: TheCaller,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(pattern=r"^[a-z_-]{1,32}$")] = None,
) -> Page[FileObject]:
    """Your files, the newest first."""
    last = None if after is None else await _row(desk, caller, after)
    files = Files(desk.ledger.engine)
    rows = await desk.call(
        files.list, caller.tenant, limit + 1, last, purpose, newest_first=order == "desc"
    )
    return page_of([_object(row) for row in rows], limit)


@router.get("/{file_id}", summary="Show a file")
async def show(file_id: str, desk: TheDesk, caller: TheCaller) -> FileObject:
    """Its name, size and times."""
    return _object(await _row(desk, caller, file_id))


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    response_class=FileResponse,
    responses={200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
)
async def content(file_id: str, desk: TheDesk, caller: TheCaller) -> FileResponse:
    """The file itself."""
    row = await _row(desk, caller, file_id)
    path = desk.settings.files_folder / row.file_id
    if not await desk.call(path.is_file):
        raise HTTPException(404, f"file {file_id!r}: its content is not in this server's folder")
    return FileResponse(path, media_type="application/jsonl", filename=f"{row.file_id}.jsonl")


@router.delete("/{file_id}", summary="Delete a file")
async def delete(file_id: str, desk: TheDesk, caller: TheCaller) -> FileDeleted:
    """Delete a file. One that a batch is made from is kept until the batch has ended: 409."""
    removed = await desk.call(Files(desk.ledger.engine).remove, file_id, caller.tenant)
    if removed is None:
        raise _no_such(file_id)
    if not removed:
        raise HTTPException(
            409, f"file {file_id!r}: a batch is made from it; cancel that, or delete it later"
        )
    await desk.call(Path.unlink, desk.settings.files_folder / file_id, missing_ok=True)
    return FileDeleted(id=file_id)


async def _row(desk: Desk, caller: Caller, file_id: str) -> Any:
    row = await desk.call(Files(desk.ledger.engine).find, file_id, caller.tenant)
    if row is None:
        raise _no_such(file_id)
    return row


def _no_such(file_id: str) -> HTTPException:
    return HTTPException(404, f"file {shown(file_id)}: no such file")


def _object(row: Any) -> FileObject:
    return FileObject(
        id=row.file_id,
        bytes=row.bytes,
        created_at=row.created_us // 10**6,
        expires_at=None if row.expires_us is None else row.expires_us // 10**6,
        filename=row.filename,
        purpose=row.purpose,
    )


def _checked(fields: dict[str, str]) -> int | None:
    """After how many seconds the file expires. Raises HTTPException."""
    unknown = sorted(fields.keys() - {"purpose", *EXPIRES_FIELDS})
    if unknown:
        raise HTTPException(400, f"{shown(unknown[0])}: no such field; remove it")
    if fields.get("purpose") != "batch":
        raise HTTPException(400, f"purpose: wanted batch (got {shown(fields.get('purpose'))})")
    anchor, seconds = (fields.get(name) for name in EXPIRES_FIELDS)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise HTTPException(400, f"{EXPIRES_FIELDS[0]}: wanted created_at (got {shown(anchor)})")
    seconds = seconds or ""
    if not (seconds.isdecimal() and len(seconds) < 9 and int(seconds) in EXPIRES_S):
        raise HTTPException(
            400,
            f"{EXPIRES_FIELDS[1]}: wanted {EXPIRES_S[0]} to {EXPIRES_S[-1]} (got {shown(seconds)})",
        )
    return int(seconds)
