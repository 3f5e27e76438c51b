"""graphopt: edit a live model graph while it serves."""
