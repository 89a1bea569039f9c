"""Adapter files of every program: read, apply, mix, merge, inspect and write."""
