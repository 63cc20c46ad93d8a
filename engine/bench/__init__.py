"""What `glm-rlhf bench` measures, by the one harness that every claim goes through."""
