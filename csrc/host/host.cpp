// mpkernels._host: facts about this machine and its build, and its ceilings measured without torch. Takes no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

// Names as in /proc/cpuinfo; only what the operating system lets programs use.
std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define MPKERNELS_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.emplace_back(name);
  MPKERNELS_FEATURE("avx")
  MPKERNELS_FEATURE("avx2")
  MPKERNELS_FEATURE("fma")
  MPKERNELS_FEATURE("f16c")
  MPKERNELS_FEATURE("bmi2")
  MPKERNELS_FEATURE("avx512f")
  MPKERNELS_FEATURE("avx512bw")
  MPKERNELS_FEATURE("avx512dq")
  MPKERNELS_FEATURE("avx512vl")
  MPKERNELS_FEATURE("avx512vnni")
  MPKERNELS_FEATURE("avx512bf16")
#undef MPKERNELS_FEATURE
#endif
  return found;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work(thread) on `threads` threads and returns the seconds it took.
template <typename Work>
double timed(int threads, const Work& work) {
  std::vector<std::thread> pool;
  const double start = seconds();
  for (int t = 0; t < threads; ++t) pool.emplace_back(work, t);
  for (std::thread& thread : pool) thread.join();
  return seconds() - start;
}

void check(int threads, int64_t size, int repeats) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
  if (size < 1) throw std::invalid_argument("bytes: expected at least 1, got " + std::to_string(size));
  if (repeats < 1) throw std::invalid_argument("repeats: expected at least 1, got " + std::to_string(repeats));
}

// Bytes a second that memcpy reads and writes, the best of `repeats`, each thread on memory of its own.
double copy_bandwidth(int threads, int64_t bytes, int repeats) {
  check(threads, bytes, repeats);
  const size_t each = static_cast<size_t>(bytes / threads);
  std::vector<std::unique_ptr<char[]>> from, to;
  for (int t = 0; t < threads; ++t) {
    from.emplace_back(new char[each]);
    to.emplace_back(new char[each]);
    std::memset(from.back().get(), 1, each);
    std::memset(to.back().get(), 2, each);
  }
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    best = std::min(best, timed(threads, [&](int t) { std::memcpy(to[t].get(), from[t].get(), each); }));
  }
  return 2.0 * static_cast<double>(each) * threads / best;
}

typedef float Wide __attribute__((vector_size(64)));

// Floating-point operations a second of fused multiply-adds in registers, the best of `repeats`.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("avx512f", "avx2,fma", "default")))
#endif
float multiply_add(int64_t rounds) {
  Wide sums[12] = {};
  const Wide a = Wide{} + 0.999f, b = Wide{} + 0.001f;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < 12; ++k) sums[k] = sums[k] * a + b;
  }
  Wide total = sums[0];
  for (int k = 1; k < 12; ++k) total += sums[k];
  return total[0] + total[7];
}

double multiply_add_rate(int threads, int repeats) {
  check(threads, 1, repeats);
  const int64_t rounds = 2'000'000;
  double best = 1e30;
  std::vector<float> sink(static_cast<size_t>(threads));
  for (int i = 0; i < repeats; ++i) {
    best = std::min(best, timed(threads, [&](int t) { sink[t] = multiply_add(rounds); }));
  }
  return 2.0 * 16 * 12 * static_cast<double>(rounds) * threads / best;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Facts about this machine and its build, and its ceilings. Takes no tensors.";
  module.def("cpu_features", &cpu_features, "Instruction sets that the processor and the system offer.");
  module.def("compiler", &compiler, "The compiler that built the libraries.");
  module.def("copy_bandwidth", &copy_bandwidth, pybind11::arg("threads"), pybind11::arg("bytes") = 256 << 20,
             pybind11::arg("repeats") = 5, pybind11::call_guard<pybind11::gil_scoped_release>(),
             "Bytes a second read and written by memcpy on `threads` threads (best of `repeats`).");
  module.def("multiply_add_rate", &multiply_add_rate, pybind11::arg("threads"), pybind11::arg("repeats") = 3,
             pybind11::call_guard<pybind11::gil_scoped_release>(),
             "float32 operations a second of fused multiply-adds in registers (best of `repeats`).");
}
