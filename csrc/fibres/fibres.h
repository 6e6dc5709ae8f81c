// Runs CUDA kernels on the CPU, a fibre per CUDA thread, for tests on machines without a GPU.
//
// A fibre is a function call with a stack of its own, which can stop in the middle and be continued later. One OS
// thread runs all the fibres of a block, one at a time; the fibre that runs decides when to stop. The machine model:
//
//   Blocks run one after another, each to its end. All threads of a block are fibres, run round-robin.
//   A fibre runs until it must wait for others: at __syncthreads and its relatives, at __syncwarp, and at every
//   warp operation (shuffle, ballot, match, reduce). Only there, or at __nanosleep and after a long run of atomics,
//   does the next fibre get its turn. So lanes of a warp do not move in lock-step: a lane may be a whole phase
//   ahead of its neighbour until a __syncwarp holds it, and code that relied on lock-step gives a wrong answer.
//   A warp operation: each lane deposits its value and waits. The lane that completes the mask works out the
//   result of every lane from the deposits, and all of them may go on. Lanes are matched by operation, type and
//   mask, not by line of code, so a warp may be split between sub-masks, and the arms of a branch may meet.
//   Lanes that the block does not have (block size no multiple of 32) are dropped from masks.
//   __syncthreads holds every thread of the block, at one call site: the same line of the same file.
//   __activemask() names the calling lane alone. CUDA promises no more: lanes need never be converged.
//   Shared memory is filled with 0xFF bytes (a NaN, or -1) before every block, dynamic and static alike, so a
//   kernel that reads what it has not written does not find the previous block's values.
//
// The environment, read at every launch:
//   MPKERNELS_FIBRES_ORDER=forward | reverse | random:SEED
//     The order in which threads of a block, and blocks, get their turn; forward if unset. A missing barrier
//     that one order hides shows as a wrong result in another, so test a kernel under several. `random` also lets
//     some fibres run far ahead of others, and gives turns away at atomics.
//   MPKERNELS_FIBRES_THREADS=N
//     OS threads that share the blocks of a launch; 1 if unset. Results should not depend on it.
//   MPKERNELS_FIBRES_STACK_KB=N
//     The stack of one fibre; 64, or 256 under AddressSanitizer, if unset. A guard page lies below each.
//
// Errors leave the launch as mpkernels::fibres::Error (a std::runtime_error) on the calling thread; all fibres have
// been unwound and the next launch starts afresh. Each message names kernel, block and thread, and what the other
// threads were doing:
//   divergent barrier   threads wait in __syncthreads while others have exited, or wait at another barrier.
//   deadlock            no thread of the block can run; with a warp operation that waits for lanes of its mask
//                       that have exited, or wait elsewhere. (CUDA forgives exited lanes in a mask; this does not.)
//   lane not in its own mask, shuffle from a lane that is not in the mask, width that is not a power of two.
//   __trap, a failed assert, and any C++ exception thrown by the kernel.
//   a launch with an empty grid or block, more than 1024 threads, or more than 227 KiB of dynamic shared memory.
//   dynamic shared memory written past its end (found after the block; AddressSanitizer finds it at once).
// Unwinding throws out of the waits of all other fibres, so an error while some thread waits inside a noexcept
// function or a destructor ends the process.
// AddressSanitizer and UndefinedBehaviorSanitizer work, and name kernel, block and thread after their report.
// Overruns of static __shared__ arrays are found by -fsanitize=bounds (part of undefined), not by AddressSanitizer.
//
// Not modelled, to be guarded by `#if defined(MPKERNELS_ON_FIBRES)` and another path: tensor cores (mma, wgmma),
// cp.async and TMA, clusters and distributed shared memory, cooperative groups, named barriers, cub, textures,
// launches from kernels, inline PTX. Nor memory ordering, data races within a phase (a fibre is not interrupted
// between two waits), fast-math rounding (__expf is expf) or alignment of vector loads (UBSan checks that).
// __half and __nv_bfloat16 are not provided: kernels are instantiated for float and double. To add one, define the
// type with its arithmetic in a header beside vector_types.h, and let is_shuffle_value in warp.h accept it.
#pragma once

#include "fibres/atomics.h"
#include "fibres/executor.h"
#include "fibres/intrinsics.h"
#include "fibres/qualifiers.h"
#include "fibres/vector_types.h"
#include "fibres/warp.h"
