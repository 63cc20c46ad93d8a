"""What commands on a model have in common."""

from glm_rlhf.engine.build.models import answer_seed
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.sections import GenerateConfig


def test_answers_follow_from_the_runs_seed_unless_they_have_their_own():
    needed = ["model.path=m", "data.path=d", "run.seed=7"]
    assert answer_seed(load_config(GenerateConfig, None, needed)) == 7
    assert answer_seed(load_config(GenerateConfig, None, [*needed, "generation.seed=0"])) == 0
