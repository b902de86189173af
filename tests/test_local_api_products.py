"""The engine measures its ways to multiply, and takes the quickest of those that compute the same."""

from __future__ import annotations

import logging

import pytest

from local_api.base_models import share_processor

share_processor()


@pytest.fixture
def products(monkeypatch):
    from local_api import products

    monkeypatch.setattr(products, "CHOSEN", {})
    return products


def layers(count: int = 3, inputs: int = 256, outputs: int = 512, bias: bool = True) -> list:
    import torch

    torch.manual_seed(1)
    return [torch.nn.Linear(inputs, outputs, bias=bias) for _ in range(count)]


def slower(way, times: int):
    def make(*args, **kwargs):
        product = way(*args, **kwargs)
        return lambda x: [product(x) for _ in range(times)][-1]

    return make


def test_the_quickest_way_is_taken_for_each_number_of_rows(products, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(products, "WAYS", {"plain": slower(products.plain, 40), "other": products.plain})
    assert products.choose(layers()) == {"one row": "other", "a few": "other", "many": "other"}
    assert "512 x 256 weights: one row other, a few other, many other" in caplog.text
    monkeypatch.setattr(products, "WAYS", {"plain": products.plain, "other": slower(products.plain, 40)})
    products.CHOSEN.clear()
    assert set(products.choose(layers()).values()) == {"plain"}


def test_a_way_that_computes_something_else_or_fails_is_not_taken(products, monkeypatch):
    def wrong(weight, bias=None, rows=1):
        return lambda x: x.new_zeros(*x.shape[:-1], len(weight))

    def missing(weight, bias=None, rows=1):
        raise RuntimeError("no such instruction")

    ways = {"plain": slower(products.plain, 40), "wrong": wrong, "missing": missing}
    monkeypatch.setattr(products, "WAYS", ways)
    assert set(products.choose(layers()).values()) == {"plain"}


def test_it_is_measured_once_for_a_shape(products, monkeypatch):
    first = products.choose(layers())
    monkeypatch.setattr(products, "quickest", lambda *_: pytest.fail("measured again"))
    assert products.choose(layers()) is first


@pytest.mark.parametrize("way", ["plain", "packed", "vector"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_way_computes_a_linear_layer(products, way, bias):
    import torch

    (layer,) = layers(1, bias=bias)
    quick = products.QuickLinear(layer, dict.fromkeys(products.ROWS, "plain") | {"one row": way})
    for shape in ((1, 1, 256), (3, 1, 256), (2, 40, 256)):
        x = torch.randn(shape)
        with torch.inference_mode():
            assert torch.allclose(quick(x), layer(x), atol=1e-5)


def test_weights_that_are_kept_twice_are_counted(products, monkeypatch):
    import torch

    monkeypatch.setattr(products, "choose", lambda _: {"one row": "vector", "a few": "packed", "many": "packed"})
    model = torch.nn.Sequential(*layers(2))
    products.quicken(model)
    assert model.copied_bytes == 2 * 4 * 256 * 512
