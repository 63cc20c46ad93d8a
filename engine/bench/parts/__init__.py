"""What `bench` measures: kernels, passes, generation, PPO by phase, checkpoints, scaling, and peers."""
