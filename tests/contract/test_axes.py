"""Every axis: slices, masks and extracted models agree; the full spec is the base; prefixes nest; sorting is free."""

import re
from random import Random

import pytest
import torch

from nestlm.data.batch import Batch
from nestlm.elastic.axes.attn_heads import AttnHeads
from nestlm.elastic.axes.base import Axis
from nestlm.elastic.ranking.activation import Activation
from nestlm.elastic.ranking.base import order
from nestlm.elastic.sampler.base import independent
from nestlm.elastic.surgery import extract, sort_units
from nestlm.nn.decoder import Decoder
from nestlm.nn.policy import Decision, Policy, Width, constant, fixed, full
from nestlm.spec import SearchSpace, Site, SubnetSpec
from plugins import build, classes, compose, options, targets

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def masked(space: SearchSpace, spec: SubnetSpec) -> Policy:
    """The oracle: run everything and multiply what the spec leaves out by 0."""

    def mask(site: Site) -> Decision:
        whole = space.choices[site][-1]
        return Decision(Width(whole), (torch.arange(whole) < spec[site]).float())

    return constant({site: mask(site) for site in space.sites})


def random_specs(space: SearchSpace, count: int = 6) -> list[SubnetSpec]:
    return [space.smallest(), *(independent(space, Random(seed)) for seed in range(count))]


def kept_layers(decoder: Decoder, spec: SubnetSpec, *, axes: tuple[Axis, ...]) -> list[int]:
    """The layers in which something is left, counted by what each axis leaves of the block."""
    kept = []
    for layer, block in enumerate(decoder.config.blocks):
        left = block
        for axis in sorted(axes, key=lambda axis: axis.name == "depth"):
            width = spec.get(Site(axis.name, layer))
            left = left if width is None else axis.resize(left, width)
        kept += [layer] if left.num_heads or left.mlp_width else []
    return kept


def in_whole(name: str, layers: list[int]) -> str:
    """What a parameter of a model with some of the layers is called in the whole model."""
    return re.sub(r"^blocks\.(\d+)", lambda found: f"blocks.{layers[int(found[1])]}", name)


def gradients(
    decoder: Decoder, policy: Policy, tokens_BL: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    decoder.zero_grad()
    logits_BLV = decoder(tokens_BL, policy).logits_BLV
    logits_BLV.square().mean().backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in decoder.named_parameters()}
    return logits_BLV.detach(), {name: grad.clone() for name, grad in grads.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "activation-checkpointing"])
def test_sliced_equals_masked_equals_extracted(axes, decoder, space, tokens_BL, checkpointing):
    for spec in random_specs(space):
        decoder.activation_checkpointing = checkpointing
        sliced, sliced_grads = gradients(decoder, fixed(spec), tokens_BL)
        decoder.activation_checkpointing = False
        oracle, oracle_grads = gradients(decoder, masked(space, spec), tokens_BL)
        small = extract(decoder, spec, axes=axes)
        alone, alone_grads = gradients(small, full, tokens_BL)
        torch.testing.assert_close(sliced, oracle, **TOLERANCE)
        torch.testing.assert_close(sliced, alone, **TOLERANCE)
        torch.testing.assert_close(sliced_grads, oracle_grads, **TOLERANCE)
        layers = kept_layers(decoder, spec, axes=axes)
        for name, grad in alone_grads.items():
            kept = sliced_grads[in_whole(name, layers)][tuple(slice(size) for size in grad.shape)]
            torch.testing.assert_close(kept, grad, **TOLERANCE)
            kept.zero_()
        assert all(not grad.any() for grad in sliced_grads.values()), "what is skipped learns nothing"


def test_two_subnetworks_in_one_loss_under_checkpointing(decoder, space, tokens_BL):
    """State kept on modules fails here: the second forward would change what the first one recomputes."""
    one = space.smallest()
    other = next(spec for spec in random_specs(space)[3:] if spec != one)
    expected = {}
    for spec in (one, other):
        for name, grad in gradients(decoder, fixed(spec), tokens_BL)[1].items():
            expected[name] = expected.get(name, 0) + grad
    decoder.activation_checkpointing = True
    decoder.zero_grad()
    losses = [decoder(tokens_BL, fixed(spec)).logits_BLV.square().mean() for spec in (one, other)]
    sum(losses).backward()
    summed = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    torch.testing.assert_close(summed, expected, **TOLERANCE)


def test_full_spec_is_the_base(axes, decoder, space, tokens_BL):
    base = decoder(tokens_BL).logits_BLV
    assert torch.equal(decoder(tokens_BL, fixed(space.full())).logits_BLV, base)
    assert torch.equal(extract(decoder, space.full(), axes=axes)(tokens_BL).logits_BLV, base)


def test_prefixes_nest(axes, decoder, space):
    """A narrower sub-network's weights are a prefix of a wider one's, at every site."""
    wide = extract(decoder, space.full(), axes=axes).state_dict()
    narrow = extract(decoder, space.smallest(), axes=axes).state_dict()
    layers = kept_layers(decoder, space.smallest(), axes=axes)
    for name, weight in narrow.items():
        assert torch.equal(weight, wide[in_whole(name, layers)][tuple(slice(size) for size in weight.shape)])


def test_ranking_leaves_the_full_logits(axes, decoder, tokens_BL):
    before = decoder(tokens_BL).logits_BLV
    weights_before = {name: value.clone() for name, value in decoder.state_dict().items()}
    batch = Batch(tokens_BL, tokens_BL, None)
    scores = Activation(num_sequences=2).scores(decoder, axes=axes, batches=[batch], seed=0)
    sort_units(decoder, {site: order(score) for site, score in scores.items()}, axes=axes)
    torch.testing.assert_close(decoder(tokens_BL).logits_BLV, before, rtol=0, atol=1e-4)
    moved = any(not torch.equal(value, weights_before[name]) for name, value in decoder.state_dict().items())
    assert moved == any(axis.units(decoder.config.blocks[0]) > 1 for axis in axes), "blocks stay where they are"
    again = Activation(num_sequences=2).scores(decoder, axes=axes, batches=[batch], seed=0)
    for score in again.values():
        assert torch.all(score.diff() <= 1e-3), "after sorting, importance falls"


def test_what_is_observed_must_run_as_a_module(decoder, tokens_BL):
    """Maps into a site run together; a hook on one of them would count nothing."""

    class AtQueries(AttnHeads):
        def observed(self, block, *, config):
            return "attn.q", super().observed(block, config=config)[1]

    batches = [Batch(tokens_BL, tokens_BL, None)]
    with pytest.raises(AssertionError, match=r"observed at attn_heads\[0\] never ran"):
        Activation(num_sequences=1).scores(
            decoder, axes=(AtQueries(fractions=(0.5, 1.0), multiple_of=1),), batches=batches, seed=0
        )
    for parameter in decoder.blocks[0].mlp.up.parameters():  # neurons that are dead have run
        torch.nn.init.zeros_(parameter)
    axes = tuple(build("axes", "mlp_heads").values())
    scores = Activation(num_sequences=1).scores(decoder, axes=axes, batches=batches, seed=0)
    assert not scores[Site("mlp_width", 0)].any()


def test_importance_is_the_sum_of_activations(decoder, tokens_BL):
    """Against a computation by hand in the first block, over two equal batches."""
    axes = tuple(build("axes", "mlp_heads").values())
    batches = [Batch(tokens_BL, tokens_BL, None)] * 2
    scores = Activation(num_sequences=2).scores(decoder, axes=axes, batches=batches, seed=0)
    captured = {}
    block = decoder.blocks[0]
    for name, module in (("mlp", block.mlp.down), ("attn", block.attn.o)):
        module.register_forward_pre_hook(lambda module, inputs, name=name: captured.update({name: inputs[0].detach()}))
    decoder(tokens_BL)
    neurons = 2 * captured["mlp"].abs().sum((0, 1))
    groups = decoder.config.blocks[0].num_kv_groups
    heads = 2 * captured["attn"].unflatten(-1, (8, 8)).norm(dim=-1).sum((0, 1))
    torch.testing.assert_close(scores[Site("mlp_width", 0)], neurons, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[Site("attn_heads", 0)], heads.view(groups, -1).sum(1), rtol=1e-4, atol=1e-4)


def test_gates_of_one_change_nothing_and_zero_removes(decoder, space, tokens_BL):
    base = decoder(tokens_BL).logits_BLV
    gated = decoder(tokens_BL, masked(space, space.full())).logits_BLV
    torch.testing.assert_close(gated, base, **TOLERANCE)
    assert not torch.allclose(decoder(tokens_BL, masked(space, space.smallest())).logits_BLV, base, atol=1e-3)


def test_every_axis_has_a_config():
    shipped = set().union(*(targets(compose([f"axes={option}"])["axes"]) for option in options("axes")))
    assert classes("nestlm.elastic.axes", Axis) <= shipped
