"""Importing models: from torch modules, transformers folders and exported programs to graphs.

Import runs as the calling user, in the caller's process, never in the daemon: it runs the model's
own Python code.
"""
