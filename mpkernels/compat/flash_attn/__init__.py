"""What scripts take from flash_attn 2.8, on the kernels of this library: change the import, and nothing else.

    from mpkernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from mpkernels.compat.flash_attn.bert_padding import pad_input, unpad_input

The same names, arguments in the same order, layouts (B, L, H, D) and meanings; causal masks and windows are aligned to
the lower right corner. More works here: tensors on a CPU, float32 and float64, any head size up to 256, values of
another head size than the keys, NaN in hidden keys, gradients of any order. What differs is said where it differs:

- ``deterministic`` is accepted, and everything always is;
- the log-sum-exp of a query that sees no key is -inf, where flash_attn 2 says +inf; its output is 0 in both;
- ``return_attn_probs`` returns None in place of the matrix that shows the pattern of dropout;
- dropout is drawn from torch's CPU generator, so torch.manual_seed rules it, but drops other weights than flash_attn;
- wrong arguments raise ValueError or TypeError that name the argument, where flash_attn raises RuntimeError.
"""

from mpkernels.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
