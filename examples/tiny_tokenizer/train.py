"""Trains the tokenizer in this folder again: `python examples/tiny_tokenizer/train.py`."""

from pathlib import Path

from glm_rlhf.engine.commands.demo.toy_tokenizer import write_tiny_tokenizer

if __name__ == "__main__":
    print(write_tiny_tokenizer(Path(__file__).parent))
