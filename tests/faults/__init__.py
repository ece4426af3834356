"""The fault suite: real worker processes around the fake runner, a real Valkey, SQLite and
PostgreSQL, a fault at a random moment or at a boundary, and one oracle for all of them.

`pytest tests/faults` tries each fault once; `python -m tests.faults --faults 1000 --jobs 100000`
tries them again and again and writes docs/reliability.md. Both run the same functions, which
`rows.py` lists by the number of their kind. Not here: bad adapters and engine faults.
"""
