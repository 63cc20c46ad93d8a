"""transformers' model as a peer of `bench`: the usual way, sequences padded to one length."""

from collections.abc import Sequence
from pathlib import Path

import torch


class TransformersModel:
    """A model of transformers, and the tasks that ours is compared on."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """Return the logprob of every token but each sequence's first, sequences end to end."""
        logprobs = []
        for batch in batches:
            tokens_BT, mask_BT = padded(batch)
            logits_BTV = self.model(tokens_BT, attention_mask=mask_BT, use_cache=False).logits[:, :-1].float()
            logprobs_BT = logits_BTV.log_softmax(-1).gather(2, tokens_BT[:, 1:, None]).squeeze(2)
            logprobs.append(logprobs_BT[mask_BT[:, 1:] == 1])
        return [torch.cat(logprobs)]

    def gradient(self, batches: Sequence[Sequence[torch.Tensor]], denominator: float) -> list[torch.Tensor]:
        """Return the next-token loss ÷ `denominator`, and the gradient of the embedding."""
        self.model.zero_grad(set_to_none=True)
        losses = []
        for batch in batches:
            tokens_BT, mask_BT = padded(batch)
            labels_BT = tokens_BT.masked_fill(mask_BT == 0, -100)
            loss = self.model(
                tokens_BT,
                attention_mask=mask_BT,
                labels=labels_BT,
                use_cache=False,
                num_items_in_batch=denominator,
            ).loss
            loss.backward()
            losses.append(loss.detach())
        return [torch.stack(losses).sum(), self.model.get_input_embeddings().weight.grad]

    @torch.no_grad()
    def answers(self, prompts_BT: torch.Tensor, new_tokens: int) -> list[torch.Tensor]:
        """Return prompts with their greedy answers, all of one length."""
        prompts_BT = prompts_BT.to(self.device)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        mask_BT = torch.ones_like(prompts_BT)
        return [self.model.generate(prompts_BT, attention_mask=mask_BT, **options)]


def load_transformers(folder: Path, dtype: torch.dtype, device: torch.device) -> TransformersModel | str:
    """Return the model of a folder; a text that says why not where transformers is missing or too old."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        return "transformers is not installed"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (ValueError, OSError) as error:
        return f"transformers cannot load the model: {str(error).splitlines()[0][:120]}"
    return TransformersModel(model.to(device).train(), device)


def padded(sequences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [B, longest]: rows filled with 0 on the right, the mask 1 where ids are."""
    tokens_BT = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths_B = torch.tensor([len(sequence) for sequence in sequences], device=tokens_BT.device)
    places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return tokens_BT, (places_T < lengths_B[:, None]).long()
