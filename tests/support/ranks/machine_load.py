"""How much slower than alone a process runs now, by which limits on wall time grow on a busy machine."""

import time

CPU_S = 0.1


def slowdown() -> float:
    """Return wall seconds per second of CPU time that a busy loop of this process gets now, at least 1.

    1 on a machine with an idle core: limits that are multiplied by it stay what they are there.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    while (used := time.process_time() - cpu) < CPU_S:
        pass
    return max(1.0, (time.perf_counter() - wall) / used)
