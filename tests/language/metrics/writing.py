"""A small Llama with a tokenizer of its own, for what is written."""

import torch

WORDS, END, PAD = 40, 1, 0


class Tokenizer:
    """Every token is a word; the first ones are special."""

    eos_token_id, pad_token_id = END, PAD

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"w{k}" for k in ids if k > END or not skip_special_tokens)


def llama(seed=0, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": WORDS, "eos_token_id": END}
    return LlamaForCausalLM(LlamaConfig(**sizes, **options)).double()


def sample(prompt, answer):
    ids = torch.tensor(prompt + answer)
    return {"input_ids": ids, "labels": torch.tensor([-100] * len(prompt) + answer)}


def taught(model, samples, steps=60, lr=0.02):
    """Until it writes the answers."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        for one in samples:
            model(input_ids=one["input_ids"][None], labels=one["labels"][None]).loss.backward()
        optimizer.step()
    return model
