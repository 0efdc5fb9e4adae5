"""The original is the one from before training; what it lacks is named."""

import copy

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import language
from gradsurgery.language import Frozen, LogProbs, WithoutAdapter
from tests.language import oracles
from tests.language.test_losses import EXACT, given
from tests.language.tiny import REFUSALS, SAMPLES, batch, made, moved


class Dropping(nn.Module):
    """A model that is another in training mode."""

    def __init__(self, model):
        super().__init__()
        self.model, self.drop = model, nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        return self.drop(self.model(input_ids, attention_mask))


def test_log_probs_are_computed_once_and_found_by_id():
    model = made()
    known = LogProbs()
    first, second = given(which=[0, 1]), given("left", 2, which=[2, 3, 4])
    known.add(model, first)
    known.add(model, {**second, "id": torch.tensor([-7, 2**40, 9])})
    assert len(known) == 5
    later = {**given(which=[3, 0, 2]), "id": torch.tensor([2**40, 50, -7])}
    found = known.log_probs(moved(model), later)
    expected = [-oracles.total(model, SAMPLES[k]) for k in (3, 0, 2)]
    torch.testing.assert_close(found, torch.stack(expected).detach(), **EXACT)


@pytest.mark.parametrize("name", ["npo", "dpo"])
def test_kept_log_probs_serve_as_the_original_does(name):
    original = made()
    model = moved(original)
    kept = LogProbs.of(original, [given("left", 1)])
    losses = [
        language.forget_loss(name, reference=reference)(model, given())
        for reference in (kept, Frozen(original))
    ]
    torch.testing.assert_close(*losses, **EXACT)
    assert losses[0].requires_grad


def test_the_original_is_asked_in_eval_mode_and_modes_are_put_back():
    model = Dropping(made()).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    kept = LogProbs.of(model, [given()])
    frozen = Frozen(model)
    expected = torch.stack([-oracles.total(model.model, sample) for sample in SAMPLES]).detach()
    for reference in (kept, frozen):
        found = reference.log_probs(made(), given())
        torch.testing.assert_close(found, expected, **EXACT)
        assert not found.requires_grad
    assert [module.training for module in model.modules()] == before


def test_a_sample_not_seen_is_named():
    loss = language.NPO(reference=LogProbs.of(made(), [given(which=[0, 1])]))
    with pytest.raises(gs.InputError, match=r"sample 2 \(id 52\) was not seen"):
        loss(made(), given())


def test_a_sample_with_other_labels_is_named():
    known = LogProbs.of(made(), [batch(SAMPLES)])
    with pytest.raises(gs.InputError, match=r"sample 0 \(id 50\) had another text"):
        known.log_probs(made(), batch(REFUSALS))
    known.add(made(), batch(REFUSALS))
    assert known.log_probs(made(), batch(REFUSALS)).shape == (5,)
    with pytest.raises(gs.InputError, match=r"sample 1 \(id 51\) had another text"):
        swapped = batch([SAMPLES[0], ([4], [11]), *SAMPLES[2:]])
        known.log_probs(made(), swapped)


def test_samples_of_one_id_and_one_answer_are_told_apart_by_their_questions():
    """As where two files are both counted from 0."""
    samples = [([5, 9], [7, 11]), ([3, 4], [7, 11])]
    both = {**batch(samples), "id": torch.zeros(2).long()}
    model = made()
    found = LogProbs.of(model, [both]).log_probs(model, both)
    expected = [-oracles.total(model, sample).item() for sample in samples]
    assert found.tolist() == pytest.approx(expected, abs=1e-12) and found[0] != found[1]
    other = {**batch([([8, 8], [7, 11])]), "id": torch.zeros(1).long()}
    with pytest.raises(gs.InputError, match=r"sample 0 \(id 0\) had another text"):
        LogProbs.of(model, [both]).log_probs(model, other)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_a_text(side):
    model = made()
    known = LogProbs.of(model, [batch(SAMPLES)])
    padded = batch(SAMPLES, side=side, extra=3)
    found = known.log_probs(model, padded)
    torch.testing.assert_close(found, known.log_probs(model, batch(SAMPLES)))
    del padded["attention_mask"]  # on the right nothing after the answer is looked at
    if side == "right":
        torch.testing.assert_close(known.log_probs(model, padded), found)


@pytest.mark.parametrize(
    ("ids", "got"),
    [(None, "NoneType"), (torch.ones(5), r"float32 \[5\]"), (torch.ones(4).long(), r"int64 \[4\]")],
)
def test_ids_that_are_none_are_named(ids, got):
    bad = {**batch(SAMPLES, ids=False), **({} if ids is None else {"id": ids})}
    with pytest.raises(gs.InputError, match=rf"id of a batch must be integers \[5\].*got {got}"):
        LogProbs.of(made(), [bad])


def test_a_batch_without_alternate_is_named():
    for loss in (language.IdkNLL(), language.DPO(reference=Frozen(made()))):
        with pytest.raises(gs.InputError, match="batch has no alternate"):
            loss(made(), batch(SAMPLES))


def test_a_frozen_model_that_trains_is_refused():
    model = made()
    with pytest.raises(gs.InputError, match="Frozen holds the model that trains"):
        language.KL(reference=Frozen(model))(model, given())
    with pytest.raises(gs.InputError, match="original must be a Module, got str"):
        Frozen("model")
    with pytest.raises(gs.InputError, match="Model has none: take Frozen"):
        language.KL(reference=WithoutAdapter())(model, given())


NEEDY = {
    "npo": lambda reference: language.NPO(reference=reference),
    "dpo": lambda reference: language.DPO(reference=reference),
    "undial": lambda reference: language.UNDIAL(reference=reference),
    "kl": lambda reference: language.KL(reference=reference),
    "rmu": lambda reference: language.RMURetain(reference=reference, layer="layers.1"),
}


@pytest.mark.parametrize("name", NEEDY)
def test_an_adapter_switched_off_is_the_original(name):
    peft = pytest.importorskip("peft")
    original = made()
    config = peft.LoraConfig(r=2, target_modules=["query", "head"], lora_dropout=0.3)
    model = peft.get_peft_model(copy.deepcopy(original), config).double().train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    trains = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    losses = []
    for reference in (WithoutAdapter(), Frozen(original)):
        torch.manual_seed(1)  # of dropout
        losses.append(NEEDY[name](reference)(model, given()))
    torch.testing.assert_close(*losses, **EXACT)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad
    model.eval()
    checked = gs.check(model, given(), loss=NEEDY[name](WithoutAdapter()))
    assert checked.exact, str(checked)
