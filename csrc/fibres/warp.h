// The operations at which threads wait for each other: barriers, shuffles, votes, matches and reductions.
// How they wait is in scheduler.h; here is what each works out when all have arrived.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "fibres/scheduler.h"

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  // As a default argument: the line that calls the function.
  constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }

  // Values travel as 64 bits, whatever their type.
  template <typename T>
  std::uint64_t to_bits(T value) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
  }

  template <typename T>
  T from_bits(std::uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  }

  // Calls visit(fibre) for each lane of the mask.
  template <typename Visit>
  void for_each_lane(Fibre * lanes, unsigned mask, Visit visit) {
    for (; mask; mask &= mask - 1) visit(lanes[__builtin_ctz(mask)]);
  }

  template <typename Visit>
  void for_each_thread(Fibre * fibres, unsigned count, Visit visit) {
    for (unsigned i = 0; i < count; ++i) visit(fibres[i]);
  }

  inline std::uint64_t meet_lanes(const Operation& operation, unsigned mask, std::uint64_t deposit, Site site) {
    BlockRunner& runner = kernel_runner(operation.name);
    return runner.meet_lanes(operation, mask, deposit, runner.running().lane(), site);
  }

  inline std::uint64_t meet_block(const Operation& operation, std::uint64_t deposit, Site site) {
    return kernel_runner(operation.name).meet_block(operation, deposit, site);
  }

  // Barriers.

  inline const Operation syncwarp{"__syncwarp", nullptr};
  inline const Operation syncthreads{"__syncthreads", nullptr};

  inline const Operation syncthreads_count{
      "__syncthreads_count", [](Fibre* fibres, unsigned threads) {
        std::uint64_t count = 0;
        for_each_thread(fibres, threads, [&](Fibre& fibre) { count += fibre.deposit; });
        for_each_thread(fibres, threads, [&](Fibre& fibre) { fibre.result = count; });
      }};

  inline const Operation syncthreads_and{"__syncthreads_and", [](Fibre* fibres, unsigned threads) {
                                           std::uint64_t all = 1;
                                           for_each_thread(fibres, threads,
                                                           [&](Fibre& fibre) { all &= fibre.deposit; });
                                           for_each_thread(fibres, threads, [&](Fibre& fibre) { fibre.result = all; });
                                         }};

  inline const Operation syncthreads_or{"__syncthreads_or", [](Fibre* fibres, unsigned threads) {
                                          std::uint64_t any = 0;
                                          for_each_thread(fibres, threads, [&](Fibre& fibre) { any |= fibre.deposit; });
                                          for_each_thread(fibres, threads, [&](Fibre& fibre) { fibre.result = any; });
                                        }};

  // Votes: the deposit is 0 or 1.

  inline unsigned ballot(Fibre * lanes, unsigned mask) {
    unsigned votes = 0;
    for_each_lane(lanes, mask, [&](Fibre& fibre) { votes |= static_cast<unsigned>(fibre.deposit) << fibre.lane(); });
    return votes;
  }

  inline const Operation ballot_sync{"__ballot_sync", [](Fibre* lanes, unsigned mask) {
                                       const unsigned votes = ballot(lanes, mask);
                                       for_each_lane(lanes, mask, [&](Fibre& fibre) { fibre.result = votes; });
                                     }};

  inline const Operation any_sync{"__any_sync", [](Fibre* lanes, unsigned mask) {
                                    const unsigned votes = ballot(lanes, mask);
                                    for_each_lane(lanes, mask, [&](Fibre& fibre) { fibre.result = votes != 0; });
                                  }};

  inline const Operation all_sync{"__all_sync", [](Fibre* lanes, unsigned mask) {
                                    const unsigned votes = ballot(lanes, mask);
                                    for_each_lane(lanes, mask, [&](Fibre& fibre) { fibre.result = votes == mask; });
                                  }};

  // Matches, of values of `bytes` bytes.

  inline void match_any(Fibre * lanes, unsigned mask) {
    for_each_lane(lanes, mask, [&](Fibre& fibre) {
      unsigned equal = 0;
      for_each_lane(lanes, mask, [&](Fibre& other) {
        if (other.deposit == fibre.deposit) equal |= 1u << other.lane();
      });
      fibre.result = equal;
    });
  }

  inline void match_all(Fibre * lanes, unsigned mask) {
    const std::uint64_t first = lanes[__builtin_ctz(mask)].deposit;
    bool all_equal = true;
    for_each_lane(lanes, mask, [&](Fibre& fibre) { all_equal = all_equal && fibre.deposit == first; });
    for_each_lane(lanes, mask, [&](Fibre& fibre) { fibre.result = all_equal ? mask : 0; });
  }

  template <int bytes>
  inline const Operation match_any_sync{"__match_any_sync", &match_any};

  template <int bytes>
  inline const Operation match_all_sync{"__match_all_sync", &match_all};

  // Reductions of 32-bit integers. The deposit of the first lane starts them.

  template <typename T, typename Combine>
  void reduce(Fibre * lanes, unsigned mask, Combine combine) {
    T total = from_bits<T>(lanes[__builtin_ctz(mask)].deposit);
    for_each_lane(lanes, mask & (mask - 1), [&](Fibre& fibre) { total = combine(total, from_bits<T>(fibre.deposit)); });
    for_each_lane(lanes, mask, [&](Fibre& fibre) { fibre.result = to_bits(total); });
  }

  inline const Operation reduce_add{
      "__reduce_add_sync", [](Fibre* lanes, unsigned mask) {
        reduce<unsigned>(lanes, mask, [](unsigned a, unsigned b) { return a + b; });  // wraps around, signed or not
      }};
  template <typename T>
  inline const Operation reduce_min{"__reduce_min_sync", [](Fibre* lanes, unsigned mask) {
                                      reduce<T>(lanes, mask, [](T a, T b) { return a < b ? a : b; });
                                    }};
  template <typename T>
  inline const Operation reduce_max{"__reduce_max_sync", [](Fibre* lanes, unsigned mask) {
                                      reduce<T>(lanes, mask, [](T a, T b) { return a > b ? a : b; });
                                    }};
  inline const Operation reduce_and{"__reduce_and_sync", [](Fibre* lanes, unsigned mask) {
                                      reduce<unsigned>(lanes, mask, [](unsigned a, unsigned b) { return a & b; });
                                    }};
  inline const Operation reduce_or{"__reduce_or_sync", [](Fibre* lanes, unsigned mask) {
                                     reduce<unsigned>(lanes, mask, [](unsigned a, unsigned b) { return a | b; });
                                   }};
  inline const Operation reduce_xor{"__reduce_xor_sync", [](Fibre* lanes, unsigned mask) {
                                      reduce<unsigned>(lanes, mask, [](unsigned a, unsigned b) { return a ^ b; });
                                    }};

  // Shuffles.

  enum class Direction { index, up, down, exclusive_or };

  inline void exchange(Fibre * lanes, unsigned mask) {
    for_each_lane(lanes, mask, [&](Fibre& fibre) { fibre.result = lanes[fibre.source].deposit; });
  }

  template <Direction direction, typename T>
  inline const Operation shuffle_operation{direction == Direction::index  ? "__shfl_sync"
                                           : direction == Direction::up   ? "__shfl_up_sync"
                                           : direction == Direction::down ? "__shfl_down_sync"
                                                                          : "__shfl_xor_sync",
                                           &exchange};

  // The lane that `lane` reads from, in segments of `width` lanes (PTX ISA, shfl.sync): its own if the other is
  // outside.
  inline unsigned source_lane(Direction direction, unsigned lane, unsigned operand, unsigned width) {
    const unsigned first = lane & ~(width - 1), last = first + width - 1;
    operand &= 31;
    switch (direction) {
      case Direction::index:
        return first + (operand & (width - 1));
      case Direction::up:
        return lane >= first + operand ? lane - operand : lane;
      case Direction::down:
        return lane + operand <= last ? lane + operand : lane;
      default:
        return (lane ^ operand) <= last ? lane ^ operand : lane;  // earlier segments can be read
    }
  }

  template <typename T>
  inline constexpr bool is_shuffle_value =
      (std::is_integral<T>::value || std::is_floating_point<T>::value) && (sizeof(T) == 4 || sizeof(T) == 8);

  // Small integers are promoted to int, as in CUDA, whose shuffles are overloaded for int.
  template <Direction direction, typename Value, typename T = decltype(+Value())>
  T shuffle(unsigned mask, Value value, unsigned operand, int width, Site site) {
    static_assert(is_shuffle_value<T>, "CUDA does not shuffle values of this type");
    const Operation& operation = shuffle_operation<direction, T>;
    BlockRunner& runner = kernel_runner(operation.name);
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
      runner.fail(std::string(operation.name) + ": width " + std::to_string(width) + " is not a power of two up to 32");
    }
    const unsigned source = source_lane(direction, runner.running().lane(), operand, static_cast<unsigned>(width));
    return from_bits<T>(runner.meet_lanes(operation, mask, to_bits<T>(value), source, site));
  }

  template <typename T>
  std::uint64_t match_bits(T value) {
    static_assert(is_shuffle_value<T>, "CUDA does not match values of this type");
    return to_bits(value);
  }

}  // namespace fibres
}  // namespace mpkernels

inline void __syncthreads(mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  mpkernels::fibres::meet_block(mpkernels::fibres::syncthreads, 0, site);
}

inline int __syncthreads_count(int predicate, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  return static_cast<int>(mpkernels::fibres::meet_block(mpkernels::fibres::syncthreads_count, predicate != 0, site));
}

inline int __syncthreads_and(int predicate, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  return static_cast<int>(mpkernels::fibres::meet_block(mpkernels::fibres::syncthreads_and, predicate != 0, site));
}

inline int __syncthreads_or(int predicate, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  return static_cast<int>(mpkernels::fibres::meet_block(mpkernels::fibres::syncthreads_or, predicate != 0, site));
}

inline void __syncwarp(unsigned mask = 0xffffffffu, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  mpkernels::fibres::meet_lanes(mpkernels::fibres::syncwarp, mask, 0, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  return static_cast<unsigned>(
      mpkernels::fibres::meet_lanes(mpkernels::fibres::ballot_sync, mask, predicate != 0, site));
}

inline int __any_sync(unsigned mask, int predicate, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  return static_cast<int>(mpkernels::fibres::meet_lanes(mpkernels::fibres::any_sync, mask, predicate != 0, site));
}

inline int __all_sync(unsigned mask, int predicate, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  return static_cast<int>(mpkernels::fibres::meet_lanes(mpkernels::fibres::all_sync, mask, predicate != 0, site));
}

inline unsigned __activemask() {
  return 1u << mpkernels::fibres::kernel_runner("__activemask").running().lane();
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  return static_cast<unsigned>(mpkernels::fibres::meet_lanes(mpkernels::fibres::match_any_sync<sizeof(T)>, mask,
                                                             mpkernels::fibres::match_bits(value), site));
}

template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate,
                          mpkernels::fibres::Site site = mpkernels::fibres::here()) {
  const auto equal = static_cast<unsigned>(mpkernels::fibres::meet_lanes(
      mpkernels::fibres::match_all_sync<sizeof(T)>, mask, mpkernels::fibres::match_bits(value), site));
  *predicate = equal != 0;
  return equal;
}

#define MPKERNELS_FIBRES_SHUFFLE(name, direction, operand_type, operand)        \
  template <typename T>                                                         \
  auto name(unsigned mask, T value, operand_type operand, int width = 32,       \
            mpkernels::fibres::Site site = mpkernels::fibres::here()) {         \
    return mpkernels::fibres::shuffle<mpkernels::fibres::Direction::direction>( \
        mask, value, static_cast<unsigned>(operand), width, site);              \
  }
MPKERNELS_FIBRES_SHUFFLE(__shfl_sync, index, int, source_lane)
MPKERNELS_FIBRES_SHUFFLE(__shfl_up_sync, up, unsigned, delta)
MPKERNELS_FIBRES_SHUFFLE(__shfl_down_sync, down, unsigned, delta)
MPKERNELS_FIBRES_SHUFFLE(__shfl_xor_sync, exclusive_or, int, lane_mask)
#undef MPKERNELS_FIBRES_SHUFFLE

#define MPKERNELS_FIBRES_REDUCE(name, operation, type)                                                               \
  inline type name(unsigned mask, type value, mpkernels::fibres::Site site = mpkernels::fibres::here()) {            \
    return mpkernels::fibres::from_bits<type>(                                                                       \
        mpkernels::fibres::meet_lanes(mpkernels::fibres::operation, mask, mpkernels::fibres::to_bits(value), site)); \
  }
MPKERNELS_FIBRES_REDUCE(__reduce_add_sync, reduce_add, unsigned)
MPKERNELS_FIBRES_REDUCE(__reduce_add_sync, reduce_add, int)
MPKERNELS_FIBRES_REDUCE(__reduce_min_sync, reduce_min<unsigned>, unsigned)
MPKERNELS_FIBRES_REDUCE(__reduce_min_sync, reduce_min<int>, int)
MPKERNELS_FIBRES_REDUCE(__reduce_max_sync, reduce_max<unsigned>, unsigned)
MPKERNELS_FIBRES_REDUCE(__reduce_max_sync, reduce_max<int>, int)
MPKERNELS_FIBRES_REDUCE(__reduce_and_sync, reduce_and, unsigned)
MPKERNELS_FIBRES_REDUCE(__reduce_or_sync, reduce_or, unsigned)
MPKERNELS_FIBRES_REDUCE(__reduce_xor_sync, reduce_xor, unsigned)
#undef MPKERNELS_FIBRES_REDUCE

inline void __nanosleep(unsigned) {
  mpkernels::fibres::kernel_runner("__nanosleep").give_turn_away();
}

[[noreturn]] inline void __trap() {
  mpkernels::fibres::kernel_runner("__trap").fail("__trap was called");
}
