"""What several benchmarks share: fresh processes, a world of one rank, thread counts."""
