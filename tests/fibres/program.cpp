// The test program: `program check NAME` runs kernels and compares them with closed forms, `program fault NAME` runs a
// broken kernel and prints the error, `program list` prints the names. test_fibres.py runs it, or loads it as a
// library.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "broken_kernels.cuh"
#include "kernels.cuh"

namespace {

using Function = void (*)();
struct Entry {
  const char* kind;
  const char* name;
  Function function;
};
std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}
struct Register {
  Register(const char* kind, const char* name, Function function) { entries().push_back({kind, name, function}); }
};

#define CHECK(name)                                              \
  void check_##name();                                           \
  const Register register_##name("check", #name, &check_##name); \
  void check_##name()
#define FAULT(name)                                                    \
  void fault_##name();                                                 \
  const Register register_fault_##name("fault", #name, &fault_##name); \
  void fault_##name()

template <typename A, typename B>
void expect_equal(const A& actual, const B& expected, const std::string& what) {
  if (actual == expected) return;
  throw std::logic_error(what + ": " + std::to_string(actual) + ", expected " + std::to_string(expected));
}

// Checks throw if a result is wrong.

CHECK(places) {
  const dim3 grid(2, 3, 4), block(5, 3, 2);
  std::vector<Place> places(2 * 3 * 4 * 5 * 3 * 2);
  MPKERNELS_LAUNCH(places_kernel, grid, block, 0, nullptr, places.data());
  std::size_t i = 0;
  for (unsigned block_index = 0; block_index < 24; ++block_index) {
    for (unsigned thread = 0; thread < 30; ++thread, ++i) {
      const unsigned expected[4][3] = {{thread % 5, thread / 5 % 3, thread / 15},
                                       {block_index % 2, block_index / 2 % 3, block_index / 6},
                                       {5, 3, 2},
                                       {2, 3, 4}};
      for (int axis = 0; axis < 3; ++axis) {
        expect_equal(places[i].thread[axis], expected[0][axis], "threadIdx");
        expect_equal(places[i].block[axis], expected[1][axis], "blockIdx");
        expect_equal(places[i].block_size[axis], expected[2][axis], "blockDim");
        expect_equal(places[i].grid_size[axis], expected[3][axis], "gridDim");
      }
    }
  }
}

template <typename T>
void check_shuffles() {
  for (const int width : {1, 2, 8, 32}) {
    for (int operand = 0; operand < 32; ++operand) {
      std::vector<T> results(4 * 64);
      MPKERNELS_LAUNCH(shuffles_kernel<T>, 1, 64, 0, nullptr, results.data(), operand, width);
      for (int thread = 0; thread < 64; ++thread) {
        const int lane = thread % 32, segment = lane / width;
        const int index = segment * width + operand % width;
        const int up = lane - operand >= segment * width ? lane - operand : lane;
        const int down = lane + operand < (segment + 1) * width ? lane + operand : lane;
        const int exclusive_or = (lane ^ operand) < (segment + 1) * width ? lane ^ operand : lane;
        const std::string what = "width " + std::to_string(width) + ", operand " + std::to_string(operand);
        expect_equal(results[thread], T(100 + index), "index, " + what);
        expect_equal(results[64 + thread], T(100 + up), "up, " + what);
        expect_equal(results[128 + thread], T(100 + down), "down, " + what);
        expect_equal(results[192 + thread], T(100 + exclusive_or), "xor, " + what);
      }
    }
  }
}

CHECK(shuffles_int) {
  check_shuffles<int>();
}
CHECK(shuffles_unsigned) {
  check_shuffles<unsigned>();
}
CHECK(shuffles_long_long) {
  check_shuffles<long long>();
}
CHECK(shuffles_float) {
  check_shuffles<float>();
}
CHECK(shuffles_double) {
  check_shuffles<double>();
}

CHECK(votes) {
  std::vector<unsigned> results(13 * 32);
  MPKERNELS_LAUNCH(votes_kernel, 1, 32, 0, nullptr, results.data());
  for (unsigned lane = 0; lane < 32; ++lane) {
    unsigned same_remainder = 0;
    for (unsigned other = lane % 5; other < 32; other += 5) same_remainder |= 1u << other;
    const unsigned expected[13] = {0x49249249u,
                                   1,
                                   1,
                                   same_remainder,
                                   lane % 2 ? 0xaaaaaaaau : 0x55555555u,
                                   0xffffffffu,
                                   0,
                                   unsigned(-16),
                                   unsigned(-16),
                                   0xffffffffu,
                                   0xf0,
                                   0xffff,
                                   0xffffffffu};
    for (int row = 0; row < 13; ++row) {
      expect_equal(results[row * 32 + lane], expected[row], "row " + std::to_string(row));
    }
  }
}

CHECK(sub_masks) {
  std::vector<int> results(32);
  MPKERNELS_LAUNCH(sub_masks_kernel, 1, 32, 0, nullptr, results.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int votes = (lane / 2 != 5 ? 100000 : 0) + (lane / 2 == 4 ? 200000 : 0);
    expect_equal(results[lane], (lane < 16 ? 120 : 31 + 8) + 1000 * (lane ^ 1) + votes, "lane " + std::to_string(lane));
  }
}

CHECK(exchange) {
  std::vector<int> results(32);
  MPKERNELS_LAUNCH(exchange_kernel, 1, 32, 0, nullptr, results.data());
  for (int lane = 0; lane < 32; ++lane) expect_equal(results[lane], 300 + ((lane & 16) | ((lane + 3) & 15)), "lane");
}

CHECK(counting_barriers) {
  for (const int threads : {1, 31, 96, 1024}) {
    std::vector<int> results(3 * threads);
    MPKERNELS_LAUNCH(counting_barriers_kernel, 1, threads, 0, nullptr, results.data());
    for (int thread = 0; thread < threads; ++thread) {
      expect_equal(results[thread], (threads + 2) / 3, "count");
      expect_equal(results[threads + thread], 1, "and");
      expect_equal(results[2 * threads + thread], threads > 3 ? 1 : 0, "or");
    }
  }
}

template <typename T>
void check_block_sum() {
  const int size = 1700, blocks = 7;  // the last block is not full
  std::vector<T> values(size), sums(blocks);
  for (int i = 0; i < size; ++i) values[i] = T(i % 100);
  MPKERNELS_LAUNCH((block_sum_kernel<T, 256>), blocks, 256, 0, nullptr, values.data(), sums.data(), size);
  for (int block = 0; block < blocks; ++block) {
    T expected = 0;
    for (int i = block * 256; i < size && i < (block + 1) * 256; ++i) expected += T(i % 100);
    expect_equal(sums[block], expected, "block " + std::to_string(block));
  }
}

CHECK(block_sum) {
  check_block_sum<float>();
  check_block_sum<double>();
}

CHECK(warp_scan) {
  std::vector<float> values(128), sums(128);
  for (int i = 0; i < 128; ++i) values[i] = float(i);
  MPKERNELS_LAUNCH(warp_scan_kernel<float>, 2, 64, 0, nullptr, values.data(), sums.data());
  for (int i = 0; i < 128; ++i) {
    const int first = i / 32 * 32;
    expect_equal(sums[i], float((i - first + 1) * (i + first) / 2), "element " + std::to_string(i));
  }
}

CHECK(dynamic_shared) {
  for (const int threads : {1, 100, 1024}) {
    std::vector<double> values(3 * threads), reversed(3 * threads);
    for (int i = 0; i < 3 * threads; ++i) values[i] = i;
    MPKERNELS_LAUNCH(reverse_kernel<double>, 3, threads, threads * sizeof(double), nullptr, values.data(),
                     reversed.data());
    for (int i = 0; i < 3 * threads; ++i) {
      expect_equal(reversed[i], (i / threads + 1) * threads - 1 - i % threads, "element " + std::to_string(i));
    }
  }
}

CHECK(unwritten_shared) {
  std::vector<float> found_static(6), found_dynamic(3);
  MPKERNELS_LAUNCH(unwritten_kernel<float>, 3, 1, 16, nullptr, found_static.data(), found_dynamic.data());
  MPKERNELS_LAUNCH(unwritten_kernel<float>, 3, 1, 16, nullptr, found_static.data(), found_dynamic.data());
  for (const float value : found_dynamic) expect_equal(std::isnan(value), true, "NaN in dynamic shared memory");
  for (const float value : found_static) expect_equal(std::isnan(value), true, "NaN in static shared memory");
  std::vector<int> integers(6);
  MPKERNELS_LAUNCH(unwritten_kernel<int>, 3, 1, 16, nullptr, integers.data(), integers.data());
  for (const int value : integers) expect_equal(value == -1 || value == 0, true, "-1 in shared memory");
  expect_equal(integers[4], -1, "-1 in static shared memory");
}

CHECK(atomics) {
  Atomics words{};
  words.bits_and = -1;
  words.minimum = 5;
  std::vector<int> tickets(128, -1);
  MPKERNELS_LAUNCH(atomics_kernel, 2, 64, 0, nullptr, &words, tickets.data());
  expect_equal(words.add, 128, "atomicAdd");
  expect_equal(std::set<int>(tickets.begin(), tickets.end()).size(), 128u, "tickets");
  expect_equal(words.subtract, -256, "atomicSub");
  expect_equal(words.minimum, -127, "atomicMin");
  expect_equal(words.maximum, 127, "atomicMax");
  expect_equal(words.bits_and, std::numeric_limits<int>::min(), "atomicAnd");
  expect_equal(words.bits_or, std::numeric_limits<int>::max(), "atomicOr");
  expect_equal(words.bits_xor, 0, "atomicXor");
  expect_equal(words.increment, 128u % 5, "atomicInc");
  expect_equal(words.decrement, (5u - 128u % 5) % 5, "atomicDec");
  expect_equal(words.wide_add, 128ull << 32, "atomicAdd of 64 bits");
  expect_equal(words.wide_maximum, 127ull << 40, "atomicMax of 64 bits");
  expect_equal(words.float_add, 64.0f, "atomicAdd of float");
  expect_equal(words.double_add, 32.0, "atomicAdd of double");
  expect_equal(words.compare_and_swap, 3 * 128, "atomicCAS");
  expect_equal(words.exchanged[0] >= 1 && words.exchanged[1] >= 1, true, "atomicExch");
}

CHECK(lock) {
  Atomics words{};
  MPKERNELS_LAUNCH(lock_kernel, 2, 64, 0, nullptr, &words);
  expect_equal(words.locked_count, 128, "count under the lock");
}

CHECK(last_block) {
  std::vector<int> values(100), partial(100);
  for (int i = 0; i < 100; ++i) values[i] = i;
  unsigned finished = 0;
  int total = 0;
  for (int repeat = 0; repeat < 2; ++repeat) {
    MPKERNELS_LAUNCH(last_block_kernel, 100, 32, 0, nullptr, values.data(), partial.data(), &finished, &total);
    expect_equal(total, 4950, "sum of all blocks");
  }
}

CHECK(vectors) {
  std::vector<float4> input(40), output(40);
  for (int i = 0; i < 40; ++i) input[i] = make_float4(i, i + 0.25f, i + 0.5f, i + 0.75f);
  MPKERNELS_LAUNCH(copy4_kernel, 2, 32, 0, nullptr, input.data(), output.data(), 40);
  for (int i = 0; i < 40; ++i) {
    expect_equal(output[i].x, i + 0.75f, "x");
    expect_equal(output[i].w, float(i), "w");
  }
  expect_equal(alignof(float4) + alignof(float2) + alignof(int4) + alignof(double2), 16u + 8 + 16 + 16, "alignment");
}

CHECK(functions) {
  int integers[11];
  float floats[8];
  MPKERNELS_LAUNCH(functions_kernel, 1, 1, 0, nullptr, integers, floats);
  const int expected_integers[] = {8, 16, 400, 3132, 11, 6341, 0x3f800000, 3443, 2 - 20 + 300 + 2000, 3 - 20, 1};
  const float expected_floats[] = {2.0f, 2.0f, 0.125f, 1.0f, 1.0f, 5.0f, 2.0f, 9.0f};
  for (int i = 0; i < 11; ++i) expect_equal(integers[i], expected_integers[i], "integer " + std::to_string(i));
  for (int i = 0; i < 8; ++i) expect_equal(floats[i], expected_floats[i], "float " + std::to_string(i));
}

// Faults: each throws, or a sanitizer ends the process. Buffers live until the end of the process.

int* sink() {
  static std::vector<int> memory(2048);
  return memory.data();
}

FAULT(exited_before_barrier) {
  MPKERNELS_LAUNCH(exited_before_barrier_kernel, dim3(1, 2), 64, 0, nullptr, 40);
}
FAULT(two_barriers) {
  MPKERNELS_LAUNCH(two_barriers_kernel, 1, 64, 0, nullptr, sink());
}
FAULT(two_kinds_of_barrier) {
  MPKERNELS_LAUNCH(two_kinds_of_barrier_kernel, 1, dim3(8, 2), 0, nullptr, sink());
}
FAULT(shuffle_from_exited) {
  MPKERNELS_LAUNCH(shuffle_from_exited_kernel, 1, 64, 0, nullptr, sink());
}
FAULT(ballot_meets_barrier) {
  MPKERNELS_LAUNCH(ballot_meets_barrier_kernel, 1, 32, 0, nullptr, reinterpret_cast<unsigned*>(sink()));
}
FAULT(different_masks) {
  MPKERNELS_LAUNCH(different_masks_kernel, 1, 32, 0, nullptr);
}
FAULT(not_in_own_mask) {
  MPKERNELS_LAUNCH(not_in_own_mask_kernel, 1, 32, 0, nullptr, sink());
}
FAULT(reads_outside_mask) {
  MPKERNELS_LAUNCH(reads_outside_mask_kernel, 1, 32, 0, nullptr, sink());
}
FAULT(reads_missing_lane) {
  MPKERNELS_LAUNCH(reads_missing_lane_kernel, 1, dim3(4, 5), 0, nullptr, sink());
}
FAULT(bad_width) {
  MPKERNELS_LAUNCH(bad_width_kernel, 1, 32, 0, nullptr, sink(), 12);
}
FAULT(trap) {
  MPKERNELS_LAUNCH(trap_kernel, dim3(2, 2), 8, 0, nullptr);
}
FAULT(assertion) {
  MPKERNELS_LAUNCH(assertion_kernel, 1, 8, 0, nullptr, 6);
}
FAULT(throws_standard) {
  MPKERNELS_LAUNCH(throws_kernel, 3, 8, 0, nullptr, true);
}
FAULT(throws_other) {
  MPKERNELS_LAUNCH(throws_kernel, 3, 8, 0, nullptr, false);
}
FAULT(unwinds_into_wait) {
  MPKERNELS_LAUNCH(unwinds_into_wait_kernel, 1, 64, 0, nullptr);
}
FAULT(nested_launch) {
  MPKERNELS_LAUNCH(nested_launch_kernel, 1, 1, 0, nullptr);
}
FAULT(barrier_outside_kernel) {
  __syncthreads();
}
FAULT(too_many_threads) {
  MPKERNELS_LAUNCH(empty_kernel, 1, dim3(32, 33), 0, nullptr);
}
FAULT(empty_grid) {
  MPKERNELS_LAUNCH(empty_kernel, dim3(1, 0), 32, 0, nullptr);
}
FAULT(empty_block) {
  MPKERNELS_LAUNCH(empty_kernel, 1, 0, 0, nullptr);
}
FAULT(too_deep_block) {
  MPKERNELS_LAUNCH(empty_kernel, 1, dim3(1, 1, 65), 0, nullptr);
}
FAULT(too_much_dynamic_shared) {
  MPKERNELS_LAUNCH(empty_kernel, 1, 32, 227 * 1024 + 1, nullptr);
}
FAULT(most_dynamic_shared_is_fine) {
  MPKERNELS_LAUNCH(empty_kernel, 1, 1024, 227 * 1024, nullptr);
  throw std::runtime_error("the launch was accepted");
}

FAULT(global_overrun) {
  float* values = new float[40];
  MPKERNELS_LAUNCH(global_overrun_kernel, 2, dim3(32), 0, nullptr, values, 40);
  delete[] values;
}
FAULT(dynamic_shared_overrun) {
  MPKERNELS_LAUNCH(dynamic_shared_overrun_kernel, dim3(1, 1, 2), 32, 128, nullptr, 1);
}
FAULT(static_shared_overrun) {
  MPKERNELS_LAUNCH(static_shared_overrun_kernel, 1, 32, 0, nullptr, reinterpret_cast<float*>(sink()), 2);
}
FAULT(stack_overrun) {
  MPKERNELS_LAUNCH(stack_overrun_kernel, 1, 4, 0, nullptr, reinterpret_cast<float*>(sink()), 6);
}
FAULT(signed_overflow) {
  MPKERNELS_LAUNCH(signed_overflow_kernel, 1, 32, 0, nullptr, sink(), std::numeric_limits<int>::max() - 8);
}

// Wrong results of races, printed for the test to compare: 1 if right.

template <typename Kernel>
bool neighbours_are_right(Kernel launch, int threads, int shift) {
  std::vector<int> values(threads), results(threads, -5);
  for (int i = 0; i < threads; ++i) values[i] = 10 + i;
  launch(values.data(), results.data());
  for (int i = 0; i < threads; ++i) {
    const bool has_neighbour = i + shift >= 0 && i + shift < threads;
    if (results[i] != (has_neighbour ? values[i + shift] : 0)) return false;
  }
  return true;
}

void print_races() {
  const bool barrier = neighbours_are_right(
      [](const int* values, int* results) {
        MPKERNELS_LAUNCH(missing_barrier_kernel, 1, 256, 0, nullptr, values, results);
      },
      256, -1);
  const bool syncwarp = neighbours_are_right(
      [](const int* values, int* results) {
        MPKERNELS_LAUNCH(missing_syncwarp_kernel, 1, 32, 0, nullptr, values, results);
      },
      32, 1);
  int last = -1;
  MPKERNELS_LAUNCH(block_race_kernel, 10, 32, 0, nullptr, &last);
  std::printf("missing_barrier=%d missing_syncwarp=%d last_block=%d\n", barrier, syncwarp, last);
}

void print_speed() {
  using Clock = std::chrono::steady_clock;
  const auto seconds_of = [](int repeats, int barriers) {
    const auto start = Clock::now();
    for (int i = 0; i < repeats; ++i) MPKERNELS_LAUNCH(barriers_kernel, 1, 256, 0, nullptr, barriers);
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  seconds_of(1, 1);
  const int barriers = 2000;
  const double switches = 2.0 * 256 * barriers;  // to the fibre and back
  std::printf("switches_per_second=%.0f ", switches / seconds_of(1, barriers));
  std::printf("microseconds_per_launch_of_256=%.1f\n", seconds_of(100, 0) / 100 * 1e6);
}

// Returns 0 if the function succeeds, 1 if it throws, which it prints.
int run_one(const Entry& entry) {
  try {
    entry.function();
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", entry.name, error.what());
    return 1;
  }
  return 0;
}

}  // namespace

// `program check NAME`; NAME may be "all". After a fault, everything else must still work.
extern "C" __attribute__((visibility("default"))) int run(const char* kind, const char* name) {
  int found = 0, failed = 0;
  for (const Entry& entry : entries()) {
    if (std::string(kind) != entry.kind || (std::string(name) != "all" && std::string(name) != entry.name)) continue;
    ++found;
    failed += run_one(entry);
    if (std::string(kind) == "fault") {
      check_block_sum();
      check_sub_masks();
      if (Counted::alive != 0) {
        std::printf("%s: %d objects were not destroyed\n", entry.name, Counted::alive.load());
        return 3;
      }
    }
  }
  std::fflush(stdout);
  return found == 0 ? 2 : failed > 0;
}

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "list") {
    for (const Entry& entry : entries()) std::printf("%s %s\n", entry.kind, entry.name);
  } else if (command == "races") {
    print_races();
  } else if (command == "speed") {
    print_speed();
  } else if (argc == 3) {
    return run(argv[1], argv[2]);
  } else {
    std::printf("usage: %s list | races | speed | check NAME | fault NAME\n", argv[0]);
    return 2;
  }
}
