"""How far a result may be from what it should be. Where nothing here is used, it is the same bits."""

import torch


def ulp(value, dtype):
    """The distance between neighbouring numbers of `dtype` at `value` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=info.tiny))[1] - 1
    return torch.ldexp(torch.full_like(value, info.eps), exponent)


def assert_sum(actual, exact, magnitude, terms, eps, ulps=0.5, what="sum"):
    """Sums of `terms` terms, each addition off by a relative `eps`, then rounded: by half an ulp.

    `exact` and `magnitude` are float64: the sums, and the sums of the terms' magnitudes.
    """
    error = (actual.double() - exact).abs()
    bound = ulps * ulp(exact, actual.dtype) + terms * eps * magnitude
    worst = (error / bound).max().item()
    assert (error <= bound).all(), f"the {what} differs, by {worst:.3g} times what it may"


def assert_near(actual, expected, epsilons=8):
    """Sums of the same terms, in another order or rounded at other times, as eager's of a table are."""
    atol = epsilons * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_shared(actual, expected, name):
    """Gradients of a step that processes share, which add up their parts of it."""
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-6, msg=name)


# In the names of the tables' parameters, and of adapters to them.
TABLES = (
    "pos_embed",
    "position_embedding_table",
    "position_embedding.",
    "embedding_table.",
    "pos_emb.position_embeddings",
)


def assert_same_gradients(ours, original, epsilons=8):
    """The same bits, but of a table's: its sum is taken in another order. Returns the number of those."""
    theirs = {path.replace("base_layer.", ""): p for path, p in original.named_parameters()}
    seen = tables = 0
    for path, parameter in ours.named_parameters():
        expected = theirs[path.replace("base_layer.", "")].grad
        if expected is None:
            assert parameter.grad is None, path
            continue
        seen += 1
        if any(table in path for table in TABLES):
            assert_near(parameter.grad, expected, epsilons)
            assert parameter.grad.count_nonzero() > 0, path
            tables += 1
        else:
            assert torch.equal(parameter.grad, expected), path
    assert seen
    return tables
