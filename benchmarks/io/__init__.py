"""Reading and writing model folders and checkpoints."""
