// Runs the threads of one block as fibres: who runs next, who waits for whom, and when that can never end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibres/context.h"
#include "fibres/order.h"
#include "fibres/shared_memory.h"
#include "fibres/vector_types.h"

// CUDA's built-in variables. The scheduler sets them before a fibre gets its turn.
inline thread_local __attribute__((visibility("hidden"))) uint3 threadIdx{0, 0, 0};
inline thread_local __attribute__((visibility("hidden"))) uint3 blockIdx{0, 0, 0};
inline thread_local __attribute__((visibility("hidden"))) dim3 blockDim;
inline thread_local __attribute__((visibility("hidden"))) dim3 gridDim;
constexpr int warpSize = 32;

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  // Thrown out of a launch. The message names kernel, block and thread.
  struct __attribute__((visibility("default"))) Error : std::runtime_error {
    using std::runtime_error::runtime_error;
  };

  struct Launch {
    std::string kernel;
    dim3 grid;
    dim3 block;
    std::size_t dynamic_shared_bytes;
    void (*run_thread)(const void* closure);
    const void* closure;
    Order order;
    std::size_t stack_size;

    unsigned threads_per_block() const { return block.x * block.y * block.z; }
  };

  // A line of kernel code.
  struct Site {
    const char* file;
    int line;
  };

  enum class State : std::uint8_t { ready, waiting, exited };

  struct Fibre;

  // Something at which threads wait for each other. Threads meet at the same Operation object.
  struct Operation {
    const char* name;
    // Called once all have arrived: sets `result` of each of the fibres from their `deposit` and `source`. A warp
    // passes its 32 lanes and the mask, a block all its threads and their number. Null if there is nothing to work out.
    void (*complete)(Fibre* fibres, unsigned mask_or_count);
  };

  struct Fibre {
    Context context;
    uint3 thread;    // threadIdx
    unsigned index;  // in the block, x fastest
    State state;
    bool started;
    // While waiting:
    const Operation* operation;  // null: gave its turn away, and is ready
    bool whole_block;
    unsigned mask;  // of a warp operation
    Site site;
    // The exchange:
    std::uint64_t deposit, result;
    unsigned source;  // the lane that a shuffle reads

    unsigned lane() const { return index % 32; }
  };

  class BlockRunner {
   public:
    // The runner whose fibre executes on this OS thread, or null outside of kernels.
    static BlockRunner*& current() {
      static thread_local BlockRunner* runner = nullptr;
      return runner;
    }

    explicit BlockRunner(const Launch& launch)
        : launch_(launch),
          dynamic_shared_(launch.dynamic_shared_bytes),
          turns_(launch.order),
          stacks_(StackPool::instance().acquire(launch.threads_per_block(), launch.stack_size)),
          fibres_((launch.threads_per_block() + 31) / 32 * 32),  // whole warps, so that lanes can be indexed
          warps_(fibres_.size() / 32),
          turn_order_(launch.threads_per_block()) {
      std::iota(turn_order_.begin(), turn_order_.end(), 0u);
      turns_.arrange_once(turn_order_);
    }
    BlockRunner(const BlockRunner&) = delete;
    BlockRunner& operator=(const BlockRunner&) = delete;
    ~BlockRunner() { StackPool::instance().release(stacks_); }

    // Runs a block to its end. Throws Error, after all fibres have been unwound.
    void run(uint3 block) {
      prepare(block);
      current() = this;
      std::exception_ptr failure;
      while (!failure && exited_ < thread_count()) {
        turns_.arrange_pass(turn_order_);
        bool anyone_ready = false;
        for (const unsigned index : turn_order_) {
          Fibre& fibre = fibres_[index];
          if (fibre.state != State::ready) continue;
          anyone_ready = true;
          if (turns_.misses_turn()) continue;
          resume(fibre);
          if (failure_) break;
        }
        failure = failure_;
        if (!failure && !anyone_ready) failure = std::make_exception_ptr(Error(describe_deadlock()));
      }
      if (failure) unwind_all();
      current() = nullptr;
      if (failure) std::rethrow_exception(failure);
      if (dynamic_shared_.overrun()) {
        throw Error(location(launch_, block, nullptr) + "dynamic shared memory was written past its end, which is at " +
                    std::to_string(launch_.dynamic_shared_bytes) + " bytes");
      }
    }

    // What the running fibre calls.

    Fibre& running() { return *running_; }
    const Launch& launch() const { return launch_; }
    void* dynamic_shared_memory() const { return dynamic_shared_.data(); }
    unsigned thread_count() const { return static_cast<unsigned>(turn_order_.size()); }

    // The lanes that exist in the running fibre's warp.
    unsigned existing_lanes() const { return warps_[running_->index / 32].existing; }

    // Lets others run, without waiting for anything.
    void give_turn_away() {
      if (leaves_at_once()) return;
      running_->operation = nullptr;
      suspend();
    }

    // Called at each atomic: a thread that spins on one must not keep the others from running.
    void at_atomic() {
      if (++atomics_in_turn_ < 1024 && !turns_.gives_turn_away()) return;
      give_turn_away();
    }

    // Waits until all lanes of `mask` are at `operation` with that mask.
    std::uint64_t meet_lanes(const Operation& operation, unsigned mask, std::uint64_t deposit, unsigned source,
                             Site site) {
      Fibre& self = *running_;
      if (leaves_at_once()) return 0;
      const unsigned lane = self.lane();
      Warp& warp = warps_[self.index / 32];
      if (!(mask >> lane & 1)) {
        fail(self, operation, mask, site, "lane " + std::to_string(lane) + " is not in its own mask");
      }
      mask &= warp.existing;
      if (!(mask >> source & 1)) {
        fail(self, operation, mask, site,
             "lane " + std::to_string(lane) + " reads from lane " + std::to_string(source) +
                 ", which is not in the mask");
      }
      self.deposit = deposit;
      self.source = source;
      const unsigned arrived = warp.arrive(operation, mask, lane);
      if (arrived != mask) {
        wait(operation, false, mask, site);
      } else {
        Fibre* lanes = &fibres_[self.index - lane];
        if (operation.complete) operation.complete(lanes, mask);
        for (unsigned other = 0; other < 32; ++other) {
          if (mask >> other & 1) lanes[other].state = State::ready;
        }
      }
      return self.result;
    }

    // Waits until all threads of the block are at `operation`, at that site.
    std::uint64_t meet_block(const Operation& operation, std::uint64_t deposit, Site site) {
      Fibre& self = *running_;
      if (leaves_at_once()) return 0;
      self.deposit = deposit;
      if (at_barrier_ == 0) {
        barrier_ = &operation;
        barrier_site_ = site;
      }
      const bool same =
          barrier_ == &operation && barrier_site_.line == site.line && same_text(barrier_site_.file, site.file);
      if (same) ++at_barrier_;
      if (at_barrier_ != thread_count()) {
        wait(operation, true, 0, site);
      } else {
        at_barrier_ = 0;
        if (operation.complete) operation.complete(fibres_.data(), thread_count());
        for (unsigned i = 0; i < thread_count(); ++i) fibres_[i].state = State::ready;
      }
      return self.result;
    }

    [[noreturn]] void fail(const std::string& what) { throw Error(location(launch_, ::blockIdx, running_) + what); }

    // "mpkernels fibres: kernel K, block (x,y,z), thread (x,y,z): "
    static std::string location(const Launch& launch, uint3 block, const Fibre* fibre) {
      std::string text = "mpkernels fibres: kernel " + launch.kernel + ", block " + to_text(block);
      if (fibre) text += ", thread " + to_text(fibre->thread);
      return text + ": ";
    }

    static std::string to_text(uint3 index) {
      return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
    }

   private:
    // Thrown in fibres that must end early. Not a std::exception, so that no kernel catches it by accident.
    struct Unwind {};

    // Some lanes have arrived at a warp operation.
    struct Meeting {
      const Operation* operation;
      unsigned mask, arrived;
    };

    struct Warp {
      unsigned existing = 0;
      std::vector<Meeting> meetings;

      // Returns the lanes that have arrived; when those are all of the mask, the meeting is over.
      unsigned arrive(const Operation& operation, unsigned mask, unsigned lane) {
        for (std::size_t i = 0; i < meetings.size(); ++i) {
          Meeting& meeting = meetings[i];
          if (meeting.operation != &operation || meeting.mask != mask) continue;
          meeting.arrived |= 1u << lane;
          if (meeting.arrived != mask) return meeting.arrived;
          meeting = meetings.back();
          meetings.pop_back();
          return mask;
        }
        if (mask != 1u << lane) meetings.push_back({&operation, mask, 1u << lane});
        return 1u << lane;
      }
    };

    static bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

    void prepare(uint3 block) {
      ::blockIdx = block;
      ::blockDim = launch_.block;
      ::gridDim = launch_.grid;
      static_shared_memory().fill();
      dynamic_shared_.fill();
      exited_ = at_barrier_ = 0;
      unwinding_ = false;
      failure_ = nullptr;
      for (Warp& warp : warps_) {
        warp.existing = 0;
        warp.meetings.clear();
      }
      uint3 thread{0, 0, 0};
      for (unsigned i = 0; i < thread_count(); ++i) {
        Fibre& fibre = fibres_[i];
        fibre.thread = thread;
        fibre.index = i;
        fibre.state = State::ready;
        fibre.started = false;
        fibre.operation = nullptr;
        fibre.context.start(stacks_[i], &enter_fibre, i);
        warps_[i / 32].existing |= 1u << (i % 32);
        if (++thread.x == launch_.block.x) {
          thread.x = 0;
          if (++thread.y == launch_.block.y) {
            thread.y = 0;
            ++thread.z;
          }
        }
      }
    }

    void resume(Fibre& fibre) {
      running_ = &fibre;
      ::threadIdx = fibre.thread;
      fibre.started = true;
      atomics_in_turn_ = 0;
      scheduler_.switch_to(fibre.context);
    }

    // Leaves the running fibre; returns when it has its next turn.
    void suspend() {
      running_->context.switch_to(scheduler_);
      if (unwinding_) throw Unwind{};
    }

    void wait(const Operation& operation, bool whole_block, unsigned mask, Site site) {
      Fibre& self = *running_;
      self.state = State::waiting;
      self.operation = &operation;
      self.whole_block = whole_block;
      self.mask = mask;
      self.site = site;
      suspend();
    }

    // Whether a wait must return at once because an exception passes through the fibre, and a destructor calls it.
    bool leaves_at_once() const {
      if (std::uncaught_exceptions() > uncaught_at_launch_) return true;
      if (unwinding_) throw Unwind{};
      return false;
    }

    // The bottom of a fibre's stack. It never returns, so AddressSanitizer must not put redzones here: nobody would
    // remove them before the stack is used again.
    __attribute__((no_sanitize_address, noinline)) static void enter_fibre() {
      BlockRunner& runner = *current();
      Context::entered_from(runner.scheduler_);
      runner.run_thread();
      runner.running_->context.finish_and_switch_to(runner.scheduler_);
    }

    __attribute__((noinline)) void run_thread() noexcept {
      try {
        launch_.run_thread(launch_.closure);
      } catch (const Unwind&) {
      } catch (const Error&) {
        note_failure(std::current_exception());
      } catch (const std::exception& exception) {
        note_failure(std::make_exception_ptr(
            Error(location(launch_, ::blockIdx, running_) + "the kernel threw an exception: " + exception.what())));
      } catch (...) {
        note_failure(std::make_exception_ptr(Error(location(launch_, ::blockIdx, running_) +
                                                   "the kernel threw an exception that is no std::exception")));
      }
      running_->state = State::exited;
      ++exited_;
    }

    void note_failure(std::exception_ptr failure) {
      if (!failure_) failure_ = failure;
    }

    // Ends all fibres that are in the middle of the kernel, running the destructors on their stacks.
    void unwind_all() {
      unwinding_ = true;
      for (unsigned i = 0; i < thread_count(); ++i) {
        if (fibres_[i].started && fibres_[i].state != State::exited) resume(fibres_[i]);
      }
    }

    [[noreturn]] void fail(const Fibre& fibre, const Operation& operation, unsigned mask, Site site,
                           const std::string& what);
    std::string describe_wait(const Operation& operation, bool whole_block, unsigned mask, Site site) const;
    std::string describe_fibre(const Fibre& fibre) const;
    std::string describe_deadlock() const;

    const Launch& launch_;
    DynamicSharedMemory dynamic_shared_;
    Turns turns_;
    std::vector<Stack> stacks_;
    std::vector<Fibre> fibres_;
    std::vector<Warp> warps_;
    std::vector<unsigned> turn_order_;  // indices of fibres

    Context scheduler_;  // the OS thread's own stack
    Fibre* running_ = nullptr;
    unsigned exited_ = 0;
    unsigned at_barrier_ = 0;  // threads that wait at barrier_, barrier_site_
    const Operation* barrier_ = nullptr;
    Site barrier_site_{"", 0};
    unsigned atomics_in_turn_ = 0;
    bool unwinding_ = false;
    const int uncaught_at_launch_ = std::uncaught_exceptions();
    std::exception_ptr failure_;  // of a fibre
  };

  // The runner, for functions that make sense in kernels only.
  inline BlockRunner& kernel_runner(const char* caller) {
    BlockRunner* runner = BlockRunner::current();
    if (!runner) throw Error(std::string("mpkernels fibres: ") + caller + " was called outside of a kernel");
    return *runner;
  }

  inline void* dynamic_shared_memory() {
    return kernel_runner("MPKERNELS_DYNAMIC_SHARED").dynamic_shared_memory();
  }

}  // namespace fibres
}  // namespace mpkernels

#include "fibres/diagnosis.h"
