"""What all of the ledger's tables share: their metadata, and kinds of columns and indexes."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

__all__ = ["NEVER_US", "Json", "Micros", "Serial", "metadata", "partial"]

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

Json = sa.JSON().with_variant(JSONB(), "postgresql")
Micros = sa.BigInteger
NEVER_US = 2**63 - 1
Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def partial(name: str, *columns: str, where: str) -> sa.Index:
    """Of the rows that are looked for, which are few."""
    condition = sa.text(where)
    return sa.Index(name, *columns, sqlite_where=condition, postgresql_where=condition)
