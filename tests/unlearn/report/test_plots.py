"""Pictures whose numbers and names are read as they are."""

from gradsurgery.unlearn.report import plots


def test_logarithmic_axes_have_plain_numbers():
    """Text of pictures is no formula, so powers of ten would be their source."""
    steps = {(0, "neggrad"): [{"step": k, "forget_loss": 10.0**k} for k in range(-2, 3)]}
    curves = plots.curves(steps, ["neggrad"], ["neggrad"], "forget_loss", "loss")
    histogram = plots.histogram([0.1, 1.0], [0.01], "neggrad")
    for svg, number in ((curves, "100"), (histogram, "0.0001")):
        assert "mathdefault" not in svg and f"<!-- {number} -->" in svg
