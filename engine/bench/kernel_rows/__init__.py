"""The rows a to i of the kernels' benchmark: tasks, shapes, definitions and contenders."""
