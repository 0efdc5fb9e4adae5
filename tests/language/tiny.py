"""A small causal language model, padded batches, and its predictions one token at a time."""

import torch
from torch import nn

WORDS, WIDTH = 113, 6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, h, seen):
        scores = self.query(h) @ self.key(h).mT
        return h + torch.tanh(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ self.value(h))


class Model(nn.Module):
    """Places are counted from the first token attended to, as `position_ids` of a tokenizer."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & (mask != 0)[:, None]
        seen = seen | torch.eye(length, dtype=torch.bool)
        h = self.words(input_ids) + self.places((mask.cumsum(1) - 1).clamp(min=0))
        for layer in self.layers:
            h = layer(h, seen)
        return self.head(h)


def made(seed=0):
    torch.manual_seed(seed)
    return Model().double()


def moved(model, by=0.3):
    """A model like another, elsewhere: what training made of it."""
    new = Model().double()
    new.load_state_dict({k: v + by * torch.randn_like(v) for k, v in model.state_dict().items()})
    return new


# prompts and answers of different lengths; two answers have one token
SAMPLES = [
    ([5, 9, 2], [7, 11, 3, 8]),
    ([4], [10]),
    ([1, 12, 6, 3, 9], [2, 5]),
    ([8, 8], [9, 9, 1, 4, 100, 2]),
    ([3, 3, 7], [6]),
]
REFUSALS = [(prompt, [30 + k, 31, 32][: 1 + k % 3]) for k, (prompt, _) in enumerate(SAMPLES)]
LONGER = [sample for sample in SAMPLES if len(sample[1]) > 1]


def batch(samples, side="right", extra=0, ids=True):
    """A padded batch, `extra` positions longer than its longest sample."""
    length = max(len(p) + len(a) for p, a in samples) + extra
    found = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in samples:
        pad = length - len(prompt) - len(answer)
        rows = [prompt + answer, [1] * (length - pad), [-100] * len(prompt) + answer]
        for name, row, value in zip(found, rows, (0, 0, -100), strict=True):
            padding = [value] * pad
            found[name].append(padding + row if side == "left" else row + padding)
    made = {name: torch.tensor(rows) for name, rows in found.items()}
    return {**made, "id": torch.arange(len(samples)) + 50} if ids else made


def tokens(model, sample, first=None):
    """Logits and label of each token of the answer, the text alone and not padded."""
    prompt, answer = sample
    logits = model(torch.tensor([prompt + answer]))[0]
    start = len(prompt) if first is None else first
    text = prompt + answer
    return [(logits[at - 1], text[at]) for at in range(start, len(text))]


def log_p(logits, label):
    return logits[label] - logits.exp().sum().log()
