"""How a config wants prompts answered."""

from glm_rlhf.engine.build.models import stop_ids_of
from glm_rlhf.engine.config.evaluate import EvaluateConfig
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.rollout.generate import AnswerSettings
from glm_rlhf.engine.rollout.stop_strings import stop_check
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig


def answer_settings_of(
    config: PPOConfig | EvaluateConfig, tokenizer: Tokenizer | None, glm: GLMConfig, topology: Topology
) -> AnswerSettings:
    """Return how a config wants prompts answered."""
    generation = config.generation
    with raise_on_all_ranks("finding the ids that end an answer"):
        stop_ids = stop_ids_of(config, tokenizer, glm)
    masked_V = None if tokenizer is None else tokenizer.unsampleable_ids(glm.vocab_size).to(topology.device)
    return AnswerSettings(
        generation=generation,
        sampling=SamplingSettings(
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            masked_ids_V=masked_V,
        ),
        stop_ids=stop_ids,
        stop_check=stop_check(generation.stop, tokenizer),
    )
