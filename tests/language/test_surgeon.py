"""Losses of language models as rows of a Surgeon."""

import copy

import pytest
import torch

import gradsurgery as gs
from gradsurgery import language
from tests.language.test_losses import EXACT, given
from tests.language.tiny import LONGER, REFUSALS, SAMPLES, WORDS, batch, made, moved


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).double()


def norms_in_float64(model):
    """Llama's own are computed in float32, whatever the model's dtype."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__ == "LlamaRMSNorm":
                setattr(module, name, torch.nn.RMSNorm(16, eps=norm.variance_epsilon).double())
    return model


def by_loop(model, loss, given):
    """A gradient of each sample, one backward pass each; [B, n]."""
    rows = [
        torch.autograd.grad(one, list(model.parameters()), retain_graph=True)
        for one in loss(model, given)
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("name", ["nll", "npo"])
def test_steps_on_llama_are_those_of_rows_by_autograd(name):
    model = norms_in_float64(llama())
    forget, retain = batch(SAMPLES[:3]), batch(SAMPLES[3:], "left", 1)
    loss = language.GradAscent()
    if name == "npo":
        known = language.LogProbs.of(model, [forget, {**retain, "id": torch.tensor([7, 8])}])
        retain["id"] = torch.tensor([7, 8])
        loss = language.raised(language.forget_loss("npo", reference=known))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    for each in (model, llama()):
        checked = gs.check(each, forget, loss=loss)
        assert checked.exact, str(checked)
    first, others = by_loop(model, loss, forget).mean(0), by_loop(model, loss, retain)
    rule = gs.OrthoGrad(alpha=0.5)
    update = rule(torch.cat([first[None], others]), forget=0)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule)
    info = surgeon.step(forget=forget, retain=retain, loss=loss)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close((before - after) / 0.1, update, atol=1e-9, rtol=1e-9)
    assert info.rank == 2


def losses(original):
    of = language.Frozen(original)
    layer = {"layer": "layers.1"}
    return {
        **{name: language.forget_loss(name) for name in ("grad_ascent", "wga", "satimp")},
        **{name: language.forget_loss(name) for name in ("simnpo", "idk_nll", "pdu", "raul")},
        **{name: language.forget_loss(name, reference=of) for name in ("npo", "dpo", "undial")},
        "ceu": language.forget_loss("ceu", skip=0),
        "rmu": language.forget_loss("rmu", **layer),
        "nll": language.retain_loss("nll"),
        "kl": language.retain_loss("kl", reference=of),
        "rmu retain": language.retain_loss("rmu", reference=of, **layer),
    }


@pytest.mark.parametrize("name", losses(made()))
def test_rows_are_exact(name):
    original = made()
    checked = gs.check(moved(original), given(), loss=losses(original)[name])
    assert checked.exact, str(checked)


def test_a_forget_loss_and_a_retain_loss_are_added_in_turn():
    original = made()
    model = moved(original)
    forget, retain = {**batch(SAMPLES), "alternate": batch(REFUSALS, ids=False)}, batch(LONGER)
    known = language.LogProbs.of(original, [forget])
    lowered = language.forget_loss("dpo", reference=known)
    kept = language.retain_loss("nll")
    rule = gs.GRU(objective=lowered.objective)
    surgeon = gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule)
    for at in (slice(0, 2), slice(2, 5)):
        part = {k: v[at] for k, v in forget.items() if k != "alternate"}
        other = {k: v[at] for k, v in forget["alternate"].items()}
        surgeon.add(forget={**part, "alternate": other}, loss=lowered)
        surgeon.add(retain={k: v[:3][at] for k, v in retain.items()}, loss=kept)
    surgeon.backward()
    mine = torch.cat([p.grad.flatten() for p in model.parameters()])
    rows = [by_loop(model, loss, one).mean(0) for loss, one in ((lowered, forget), (kept, retain))]
    update = gs.GRU(objective="lower")(torch.stack(rows), forget=0)
    torch.testing.assert_close(mine, update, atol=1e-10, rtol=1e-10)


def test_means_over_tokens_are_those_of_all_micro_batches():
    model = made()
    loss, rule = language.NLL(as_published=True), gs.OrthoGrad()
    updates = []
    for parts in ([SAMPLES], [SAMPLES[:2], SAMPLES[2:]]):
        other = copy.deepcopy(model)
        surgeon = gs.Surgeon(other, torch.optim.SGD(other.parameters(), lr=0.1), rule)
        for part in parts:
            surgeon.add(forget=batch(part), retain=batch(part, "left"), loss=loss)
        surgeon.backward()
        updates.append(torch.cat([p.grad.flatten() for p in other.parameters()]))
    torch.testing.assert_close(*updates, **EXACT)


@pytest.mark.parametrize("name", ["nll", "simnpo", "kl"])
def test_stored_rows_are_the_same(name):
    original = made()
    model, loss = moved(original), losses(original)[name]
    updates = []
    for rows in ("captured", "stored"):
        other = copy.deepcopy(model)
        sgd = torch.optim.SGD(other.parameters(), lr=0.1)
        surgeon = gs.Surgeon(other, sgd, gs.OrthoGrad(), rows=rows)
        surgeon.backward(forget=batch(SAMPLES), retain=batch(LONGER), loss=loss)
        updates.append(torch.cat([p.grad.flatten() for p in other.parameters()]))
    torch.testing.assert_close(*updates, atol=1e-9, rtol=1e-9)


def test_kept_log_probs_are_refused_where_ids_are_hidden():
    model, forget = made(), batch(SAMPLES)
    loss = language.NPO(reference=language.LogProbs.of(model, [forget]))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    surgeon = gs.Surgeon(model, sgd, gs.OrthoGrad(), rows="stored")
    with pytest.raises(gs.InputError, match="LogProbs looks samples up by id"):
        surgeon.step(forget=forget, retain=forget, loss=loss)
