// MPKERNELS_LAUNCH on fibres: checks the launch and runs its blocks.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibres/scheduler.h"

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  constexpr std::size_t most_dynamic_shared_bytes = 227 * 1024;  // of sm_90 and sm_100

  // A positive number from the environment.
  inline unsigned environment_number(const char* name, unsigned otherwise, unsigned most) {
    const char* text = std::getenv(name);
    if (!text || !*text) return otherwise;
    char* end = nullptr;
    const unsigned long value = std::strtoul(text, &end, 10);
    if (*end || value < 1 || value > most) {
      throw Error(std::string("mpkernels fibres: ") + name + " is '" + text + "', expected a number from 1 to " +
                  std::to_string(most));
    }
    return static_cast<unsigned>(value);
  }

  inline Order environment_order() {
    const char* text = std::getenv("MPKERNELS_FIBRES_ORDER");
    try {
      return Order::parse(text ? text : "");
    } catch (const std::invalid_argument& error) {
      throw Error(std::string("mpkernels fibres: ") + error.what());
    }
  }

  inline std::size_t environment_stack_size() {
#if defined(MPKERNELS_FIBRES_ADDRESS_SANITIZER)
    const unsigned kilobytes = 256;
#else
    const unsigned kilobytes = 64;
#endif
    const std::size_t size = environment_number("MPKERNELS_FIBRES_STACK_KB", kilobytes, 1u << 20) * std::size_t{1024};
    return (size + 65535) / 65536 * 65536;  // whole pages, whatever the size of a page
  }

  // "(kernel<float, 3>)" is how a launch with commas arrives.
  inline std::string without_parentheses(const std::string& name) {
    return name.front() == '(' ? name.substr(1, name.size() - 2) : name;
  }

  inline void check(const Launch& launch) {
    const auto refuse = [&](const std::string& what) {
      throw Error("mpkernels fibres: launch of kernel " + launch.kernel + " with grid " +
                  BlockRunner::to_text(launch.grid) + " and block " + BlockRunner::to_text(launch.block) + ": " + what);
    };
    if (BlockRunner::current()) refuse("launches from kernels are not modelled");
    const dim3 grid = launch.grid, block = launch.block;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("the grid is empty");
    if (block.x == 0 || block.y == 0 || block.z == 0) refuse("the block is empty");
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("a grid is at most (2147483647,65535,65535)");
    if (block.x > 1024 || block.y > 1024 || block.z > 64) refuse("a block is at most (1024,1024,64)");
    if (launch.threads_per_block() > 1024) {
      refuse(std::to_string(launch.threads_per_block()) + " threads in a block, the most is 1024");
    }
    if (launch.dynamic_shared_bytes > most_dynamic_shared_bytes) {
      refuse(std::to_string(launch.dynamic_shared_bytes) + " bytes of dynamic shared memory, the most is " +
             std::to_string(most_dynamic_shared_bytes));
    }
  }

  // After a sanitizer's report: whose code that was.
  inline void name_running_thread() {
    static std::atomic<bool> named{false};
    BlockRunner* runner = BlockRunner::current();
    if (!runner || named.exchange(true)) return;
    std::fprintf(stderr, "%sa sanitizer reported the error above\n",
                 BlockRunner::location(runner->launch(), ::blockIdx, &runner->running()).c_str());
    std::fflush(stderr);
  }

  inline void run(const Launch& launch) {
    check(launch);
    const unsigned os_threads = environment_number("MPKERNELS_FIBRES_THREADS", 1, 1024);
    static const bool reports_name_threads = (sanitizers::call_on_report(&name_running_thread), true);
    static_cast<void>(reports_name_threads);
    const std::uint64_t count = std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    std::atomic<std::uint64_t> next_turn{0};
    std::mutex failure_mutex;
    std::exception_ptr failure;
    std::uint64_t failed_turn = 0;

    const auto work = [&] {
      std::uint64_t turn = count;
      try {
        BlockRunner runner(launch);
        while ((turn = next_turn++) < count) {
          const std::uint64_t block = launch.order.block_at(turn, count);
          runner.run({static_cast<unsigned>(block % launch.grid.x),
                      static_cast<unsigned>(block / launch.grid.x % launch.grid.y),
                      static_cast<unsigned>(block / launch.grid.x / launch.grid.y)});
        }
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failure_mutex);
        if (!failure || turn < failed_turn) {
          failure = std::current_exception();
          failed_turn = turn;
        }
        next_turn = count;  // the others stop after their block
      }
    };

    std::vector<std::thread> others;
    for (unsigned i = 1; i < os_threads && i < count; ++i) others.emplace_back(work);
    work();
    for (std::thread& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
  }

}  // namespace fibres

template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t dynamic_shared_bytes, cudaStream_t, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel takes another number of arguments");
  // A launch copies its arguments, and each thread has parameters of its own.
  struct Closure {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  const Closure closure{kernel, {static_cast<Parameters>(std::forward<Arguments>(arguments))...}};
  const auto run_thread = [](const void* closure) {
    const Closure& call = *static_cast<const Closure*>(closure);
    std::apply(call.kernel, call.arguments);
  };
  fibres::run({fibres::without_parentheses(name), grid, block, dynamic_shared_bytes, run_thread, &closure,
               fibres::environment_order(), fibres::environment_stack_size()});
}

}  // namespace mpkernels
