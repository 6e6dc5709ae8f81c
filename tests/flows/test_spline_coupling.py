"""What the spline coupling promises, on every backend."""

from mpkernels.testing.properties import OpProperties


class SplineProperties(OpProperties):
    ops = ("spline_coupling",)


class TestReference(SplineProperties):
    backend = "reference"
