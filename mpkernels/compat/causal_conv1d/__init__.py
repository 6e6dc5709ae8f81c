"""What scripts take from causal_conv1d 1.6, on the kernels of this library: change the import, and nothing else.

    from mpkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states

The same names, arguments in the same order, dtypes (inputs and states of one, weights and biases of any) and
conventions of the state. More works here: tensors on a CPU, float64, any width (there 2 to 4), states and final states
in both memory orders and together with ``seq_idx``, gradients of any order. What differs is said where it differs:

- weights and biases that are not of the dtype of x are read as float32 (float64 beside float64 inputs);
- wrong arguments raise ValueError or TypeError that name the argument, where causal_conv1d raises RuntimeError, an
  AssertionError or NotImplementedError;
- ``seq_idx`` that falls along a row is refused on a CPU; below 0 it is padding, with output 0, as there.
"""

from mpkernels.compat.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from mpkernels.compat.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

__version__ = "1.6.0"

__all__ = ["__version__", "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]
