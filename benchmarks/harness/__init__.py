"""What several benchmarks share: the command line, fresh processes, pipeline stages, model shapes."""
