"""Answers that a model writes, and how like the true ones they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradsurgery.errors import InputError
from gradsurgery.extras import package
from gradsurgery.language.metrics.scores import numbered
from gradsurgery.language.reference import still
from gradsurgery.language.tokens import IGNORED, Batch, named
from gradsurgery.ops._inputs import check_count
from gradsurgery.ranks.shards import gathering


class Generated(NamedTuple):
    """What a model wrote for a sample.

    Attributes:
        prompt: [P] int64, on the CPU.
        tokens: [N] int64, what follows, up to the end of the text, which is not among them. Empty
            where the model has nothing to say.
        text: the same, decoded without special tokens.
    """

    prompt: Tensor
    tokens: Tensor
    text: str

    def sample(self) -> dict[str, Tensor]:
        """Prompt and continuation as a sample, [P + N] each, of which the continuation counts."""
        ids = torch.cat([self.prompt, self.tokens])
        labels = ids.clone()
        labels[: len(self.prompt)] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def generated(
    model: Any, batches: Batch | Iterable[Batch], tokenizer: Any, *, max_new_tokens: int = 200
) -> dict[int, Generated]:
    """What a model writes after each sample's prompt, greedily, by sample id.

    Penalties and suppressed tokens of its `generation_config` hold.

    The prompt is what stands before the first label, or the whole text of a batch without labels.
    Prompts are padded on the left, whatever the batch has.

    Args:
        model: of transformers, or one with its `generate`.
        batches: as `token_scores` takes them.
        tokenizer: with `decode`, `eos_token_id` and `pad_token_id`, either of which may be None.
        max_new_tokens: N at most: 200 for TOFU; 128 for MUSE's verbatim and 32 for its knowledge.

    Raises:
        InputError: a model that does not generate; a sample without a prompt; as `token_scores`.
    """
    check_count("max_new_tokens", max_new_tokens)
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"model must have generate, as transformers' have; got {_kind(model)}")
    found: dict[int, Generated] = {}
    with gathering(model):  # of a sharded one, for texts end after different numbers of passes
        for batch, ids in numbered(batches):
            prompts = _prompts(batch)
            for sample, prompt, tokens in zip(
                ids, prompts, _continued(model, prompts, tokenizer, max_new_tokens), strict=True
            ):
                text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
                found.setdefault(sample, Generated(prompt.cpu(), tokens, text))
    return found


def _prompts(batch: Batch) -> list[Tensor]:
    """Of each sample, without padding, on the batch's device."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    kept = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    if "labels" in batch:
        answers = (batch["labels"].to(ids.device) != IGNORED) & (kept != 0)
        kept = kept * (answers.cumsum(1) == 0)
    prompts = [row[own != 0] for row, own in zip(ids, kept, strict=True)]
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"{named(batch, place)} has no prompt to continue")
    return prompts


def _continued(model: Any, prompts: list[Tensor], tokenizer: Any, most: int) -> list[Tensor]:
    ends = _ends(model, tokenizer)
    pad = next((t for t in (tokenizer.pad_token_id, *ends) if t is not None), 0)

    def left(rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

    padded = left(prompts, pad)
    mask = left([torch.ones_like(prompt) for prompt in prompts], 0)
    with still(model):
        output = model.generate(
            input_ids=padded,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            # set to sample, as many models come; transformers warns of them where it does not
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=ends or None,
            pad_token_id=pad,
        )
    return [_before(row, ends) for row in output[:, padded.shape[1] :].cpu()]


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the model's own, which may be several, or the tokenizer's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = tokenizer.eos_token_id if own is None else own
    return [] if own is None else [own] if isinstance(own, int) else list(own)


def _before(row: Tensor, ends: list[int]) -> Tensor:
    at = torch.isin(row, torch.tensor(ends, dtype=row.dtype, device="cpu")).nonzero()
    return row[: int(at[0])] if len(at) else row


class Rouge(NamedTuple):
    """ROUGE-L of a text beside the true one, each in [0, 1]."""

    precision: float
    recall: float
    f1: float


def rouge_l(
    true: Mapping[int, str], written: Mapping[int, str], *, stemmer: bool = True
) -> dict[int, Rouge]:
    """ROUGE-L by sample id, from the longest common subsequence of words, by rouge-score.

    TOFU reports recall, MUSE F1. 0 where nothing was written. Words are what rouge-score takes for
    them, letters a to z and digits.

    Args:
        true: what should have been written.
        written: what was, of the same samples.
        stemmer: whether words are compared without their endings, as public code has it.

    Raises:
        InputError: rouge-score is not installed; a sample of `true` that was not written.

    ROUGE: A Package for Automatic Evaluation of Summaries, Lin 2004.
    """
    scorer = package("rouge_score.rouge_scorer", "language", "rouge_l").RougeScorer(
        ["rougeL"], use_stemmer=stemmer
    )
    missing = [sample for sample in true if sample not in written]
    if missing:
        raise InputError(f"written lacks sample id {missing[0]}")
    found = {}
    for sample, text in true.items():
        one = scorer.score(text, written[sample])["rougeL"]
        found[sample] = Rouge(float(one.precision), float(one.recall), float(one.fmeasure))
    return found


def _kind(value: object) -> str:
    return type(value).__name__
