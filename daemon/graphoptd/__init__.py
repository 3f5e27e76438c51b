"""The graphopt service: it holds live graphs, serves them, and edits them while it serves."""
