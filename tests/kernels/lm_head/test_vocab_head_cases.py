"""The tiles of the vocabulary head: which exist, and where they are launched."""

from glm_rlhf.kernels.lm_head import vocab_head
from glm_rlhf.kernels.lm_head.vocab_head_cases import compile_cases


def test_tiles_are_launched_on_their_generation():
    generations = {"hopper": (90,), "blackwell": (100,)}
    for case in compile_cases():
        special = [targets for name, targets in generations.items() if f"_{name}/" in case.name]
        assert case.launched_on == (special[0] if special else (80, 90, 100))


def test_every_tile_has_its_cases():
    shapes = [s for s in vars(vocab_head).values() if isinstance(s, vocab_head.TileShape)]
    bf16_shapes = [shape for shape in shapes if shape is not vocab_head.FLOAT32]
    cases = [case for case in compile_cases() if "BLOCK_D" in case.constexprs]
    assert len(cases) == 3 * len(bf16_shapes)
    for shape in bf16_shapes:
        fitting = [c for c in cases if c.constexprs["BLOCK_V"] == shape.columns]
        assert any(c.num_stages == shape.num_stages and c.num_warps == shape.num_warps for c in fitting)
