"""Steps of language models of transformers, by the losses of `gradsurgery.language`.

4 forget sequences in one row and 4 retain sequences, a row each, of 256 tokens, on a Llama of 8
layers of width 256; the plain step trains on the mean of the 8.
"""

import copy

import pytest
import torch

import gradsurgery as gs
from gradsurgery.bench.steps import PLAIN, distance, parameters, update_of
from gradsurgery.language import lm_losses
from gradsurgery.language.head import whole

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's calls of transformers
SIZE, LENGTH = 4, 256
HEAD, OURS_HEAD = "plain step, head everywhere", "ours, head everywhere"
# times faster than the plain step at least, and extra memory of a plain step's at most
STEPS = {
    "whole": (1 / 1.15, None),
    "LoRA": (1 / 1.06, None),
    "whole, checkpoints": (1 / 1.35, 1.3),
    "LoRA, checkpoints": (1 / 1.35, 1.3),
}


def llama(words):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, num_attention_heads=4, **sizes)).train()


def make(name):
    model = llama(512)
    if name.startswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        for parameter in parameters(model):  # not zero: as after some steps
            torch.nn.init.normal_(parameter, std=0.02)
    if name.endswith("checkpoints"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def batches(words, answer=LENGTH):
    """Two batches of texts, the last `answer` tokens of which count."""
    made = []
    for _ in range(2):
        ids = torch.randint(words, (SIZE, LENGTH))
        labels = ids.clone()
        labels[:, : LENGTH - answer] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def together(first, second):
    return {name: torch.cat([first[name], second[name]]) for name in first}


def exact_update(model, forget, retain, alpha=0.5):
    model = copy.deepcopy(model).double()
    held = parameters(model)
    rows = []
    for batch in (forget, *({k: v[i : i + 1] for k, v in retain.items()} for i in range(SIZE))):
        parts = torch.autograd.grad(lm_losses(model, batch).mean(), held, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(held, parts, strict=True)]
        rows.append(torch.cat([part.flatten() for part in filled]))
    g_u, rows = rows[0], torch.stack(rows[1:])
    coefficients = torch.linalg.solve(rows @ rows.mT, rows @ g_u)
    return alpha * rows.mean(0) - (1 - alpha) * (g_u - coefficients @ rows)


def plain_step(model, forget, retain, loss=lm_losses):
    optimizer, both = torch.optim.SGD(parameters(model), lr=0.0), together(forget, retain)

    def step():
        loss(model, both).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(model, forget, retain, loss=lm_losses):
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    surgeon = gs.Surgeon(model, optimizer, gs.OrthoGrad())

    def step():
        surgeon.step(forget=forget, retain=retain, loss=loss)

    return step, optimizer


def everywhere(model, batch):
    """The same losses of logits at all positions."""
    whole.add(model)
    try:
        return lm_losses(model, batch)
    finally:
        whole.discard(model)


@pytest.mark.parametrize("name", STEPS)
def bench_language_step(compare, name):
    target, memory = STEPS[name]
    model = make(name)
    forget, retain = batches(512)
    exact = exact_update(model, forget, retain)
    ours, optimizer = our_step(model, forget, retain)
    error = distance(update_of(ours, model, optimizer), exact)
    size = exact.numel()
    del exact
    compare(
        ours,
        {PLAIN: plain_step(copy.deepcopy(model), forget, retain)},
        nbytes=3 * 4 * size,
        error=error,
        result_bytes=0,
        target={PLAIN: target},
        memory_target={PLAIN: memory} if memory else None,
        rounds=9,
    )


def bench_head(compare):
    """A vocabulary of 32,000, and answers of 56 tokens after prompts of 200."""
    model = llama(32000)
    forget, retain = batches(32000, answer=56)
    ours, _ = our_step(model, forget, retain)
    other = copy.deepcopy(model)
    found, expected = (
        torch.cat([p.grad.flatten() for p in parameters(each)])
        for each in (_gradient(model, forget, lm_losses), _gradient(other, forget, everywhere))
    )
    compare(
        ours,
        {
            PLAIN: plain_step(copy.deepcopy(model), forget, retain),
            HEAD: plain_step(other, forget, retain, everywhere),
            OURS_HEAD: our_step(copy.deepcopy(model), forget, retain, everywhere)[0],
        },
        nbytes=3 * 4 * found.numel(),
        error=distance(found, expected),
        result_bytes=0,
        target={OURS_HEAD: 1.0},
        rounds=5,
    )


def _gradient(model, batch, loss):
    loss(model, batch).mean().backward()
    return model
