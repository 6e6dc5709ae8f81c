// The words of CUDA C++ that a C++ compiler does not know.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// __noinline__ stays undefined: the headers of libstdc++ write __attribute__((__noinline__)).

// One copy for each OS thread, and so for each block that runs. The tag becomes part of the symbol's name, by which
// shared_memory.h finds these variables to fill them before each block.
#define __shared__ static thread_local __attribute__((abi_tag("mpkernels_shared")))

#define MPKERNELS_HOST_DEVICE

#define MPKERNELS_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::mpkernels::fibres::dynamic_shared_memory())
