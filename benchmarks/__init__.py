"""Benchmarks: python -m benchmarks.NAME; what each measures stands in its docstring."""
