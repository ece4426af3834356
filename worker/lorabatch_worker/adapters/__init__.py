"""Adapters: found by name, read and checked, cached in host memory, resident in device slots."""
