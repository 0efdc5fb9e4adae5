"""Mixtures of experts: a router's auxiliary loss is of all samples at once, and is refused."""

import copy

import pytest
import torch
from torch.nn import functional as F

import gradsurgery as gs

transformers = pytest.importorskip("transformers")

REFUSED = r"computes across samples|loss of a sample .*depends on the others"
WAYS = {
    "captured": {},
    "in parts": {"micro_batch": 1},
    "together": {"together": True},
}


@pytest.fixture
def model():
    """A tiny Mixtral in float64, whose experts are loops: torch multiplies no groups in it."""
    config = transformers.MixtralConfig(
        vocab_size=23,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        use_cache=False,
    )
    config._attn_implementation = config._experts_implementation = "eager"
    return transformers.MixtralForCausalLM(config).double()


def text(size):
    return torch.randint(23, (size, 6))


def by_sample(model, ids):
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)


def with_auxiliary(model, ids):
    out = model(input_ids=ids[:, :-1])
    each = F.cross_entropy(out.logits.mT, ids[:, 1:], reduction="none").mean(1)
    return each + 0.1 * out.aux_loss


def surgeon_of(model, rule, **options):
    return gs.Surgeon(model, torch.optim.SGD(model.parameters(), lr=0.1), rule, **options)


@pytest.mark.parametrize("way", WAYS)
def test_losses_of_samples_step_as_with_a_gradient_each(model, way):
    data, other = {"forget": text(2), "retain": text(3)}, copy.deepcopy(model)
    surgeon_of(model, gs.OrthoGrad(), **WAYS[way]).step(**data, loss=by_sample)
    # the rows are those of backward passes, one for each sample
    named = dict(other.named_parameters())
    rows = [
        torch.autograd.grad(loss, list(named.values()))
        for loss in (
            by_sample(other, data["forget"]).mean(),
            *(by_sample(other, data["retain"][k : k + 1])[0] for k in range(3)),
        )
    ]
    update = gs.OrthoGrad()([torch.stack(blocks) for blocks in zip(*rows, strict=True)])
    for (name, p), change in zip(named.items(), update, strict=True):
        expected = p.detach() - 0.1 * change
        # the router's softmax is taken in float32
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("way", [*WAYS, "stored"])
def test_an_auxiliary_loss_beside_rows_of_samples_is_refused(model, way):
    before = copy.deepcopy(model)
    options = WAYS.get(way, {"rows": "stored"})
    with pytest.raises(gs.InputError, match=REFUSED):
        surgeon_of(model, gs.OrthoGrad(), **options).step(
            forget=text(2), retain=text(3), loss=with_auxiliary
        )
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", [gs.NGDiff, gs.OrthoGrad])
def test_an_auxiliary_loss_is_refused_in_micro_batches(model, rule):
    surgeon = surgeon_of(model, rule())
    with pytest.raises(gs.InputError, match=REFUSED):
        surgeon.add(forget=text(2), retain=text(3), loss=with_auxiliary)


def test_whole_batches_of_means_may_have_an_auxiliary_loss(model):
    # two rows, the gradients of two losses of whole batches, as in ordinary training
    data, other = {"forget": text(2), "retain": text(3)}, copy.deepcopy(model)
    surgeon_of(model, gs.NGDiff()).step(**data, loss=with_auxiliary)
    named = dict(other.named_parameters())
    losses = [with_auxiliary(other, ids).mean() for ids in data.values()]
    rows = [torch.autograd.grad(loss, list(named.values())) for loss in losses]
    update = gs.NGDiff()([torch.stack(blocks) for blocks in zip(*rows, strict=True)])
    for (name, p), change in zip(named.items(), update, strict=True):
        expected = p.detach() - 0.1 * change
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-6, atol=1e-7)
