from mpkernels.testing.properties import OpProperties
import pytest
class AttentionProperties(OpProperties):
    ops = ("attention",)
class TestReference(AttentionProperties):
    backend = "reference"
class TestCpu(AttentionProperties):
    backend = "cpu"
