"""`graphoptctl`, the command line client. It imports nothing that needs torch, so it starts quickly."""
