"""The runtimes that come with graphopt, a file or more each; see `graphopt.executor.backend`."""
