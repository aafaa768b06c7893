"""New heads measure the features they read; others keep what they have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intarsia.patches.heads import HeadForm
from intarsia.train.calibrate import calibrate, new_heads
from tests.train import make


def states(host, features) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Final hidden states of each example by itself, [T, d]."""
    found = []
    with torch.no_grad():
        for f in features:
            ids = torch.tensor([f["input_ids"]])
            found.append(host.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0])
    return found


@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_features_become_standard_normal(kind: str) -> None:
    host, task = make.host(kind)
    features = task.features(make.table(30))
    (head,) = new_heads(host, "m")
    assert calibrate(host, "m", task, features, expression="m", batch_size=7) == 1
    seen = torch.stack([s.mean(0) for s in states(host, features)]) if kind == "classify" else torch.cat(states(host, features))
    torch.testing.assert_close(head.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    scaled = (seen - head.mean) * head.scale
    torch.testing.assert_close(scaled.std(0, unbiased=False), torch.ones(scaled.shape[1]), rtol=1e-3, atol=1e-3)


def test_a_measured_head_keeps_what_it_has() -> None:
    host, task = make.host("classify")
    features = task.features(make.table(30))
    calibrate(host, "m", task, features, expression="m")
    before = {key: tensor.clone() for key, tensor in host.tensors("m").items()}
    assert calibrate(host, "m", task, features[:3], expression="m") == 0
    assert all(torch.equal(before[key], tensor) for key, tensor in host.tensors("m").items())


def test_rows_are_drawn_and_modes_and_hooks_are_given_back() -> None:
    host, task = make.host("classify")
    features = task.features(make.table(30))
    host.model.train()
    (head,) = new_heads(host, "m")
    calibrate(host, "m", task, features, expression="m", rows=10, seed=1)
    assert len({row for _, rows in task.collated for row in rows}) == 10
    assert all(module.training for module in host.model.modules()) and not head._forward_pre_hooks
    assert isinstance(head, HeadForm)


def test_a_module_without_a_head_has_nothing_to_measure() -> None:
    host, task = make.host("mlm")
    assert calibrate(host, "m", task, task.features(make.table(4)), expression="m") == 0
