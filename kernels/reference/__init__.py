"""Every op in plain fp32 torch: the CPU path, the test oracle, the benchmark baseline."""
