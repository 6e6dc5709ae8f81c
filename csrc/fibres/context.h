// Stacks, and the switch from one to another.
//
// The switch is a dozen instructions: it pushes the registers that the calling convention says a function must
// preserve, exchanges stack pointers and pops them again. Everything else is saved by the compiler around the call.
// ucontext, the portable way, makes a system call at each switch and takes some hundred times as long; it is used
// on other processors and systems, or if MPKERNELS_FIBRES_USE_UCONTEXT is defined.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "fibres/sanitizers.h"

#if !defined(MPKERNELS_FIBRES_USE_UCONTEXT) && !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)))
#define MPKERNELS_FIBRES_USE_UCONTEXT 1
#endif

#if defined(MPKERNELS_FIBRES_USE_UCONTEXT)
#include <ucontext.h>
#else

// void mpkernels_fibres_switch(void** saved_stack_pointer, void* next_stack_pointer)
extern "C" void mpkernels_fibres_switch(void** saved_stack_pointer, void* next_stack_pointer);

#define MPKERNELS_FIBRES_ASSEMBLY(body)                                                               \
  asm(".pushsection .text.mpkernels_fibres_switch,\"axG\",%progbits,mpkernels_fibres_switch,comdat\n" \
      ".weak mpkernels_fibres_switch\n"                                                               \
      ".hidden mpkernels_fibres_switch\n"                                                             \
      ".type mpkernels_fibres_switch,%function\n"                                                     \
      ".p2align 4\n"                                                                                  \
      "mpkernels_fibres_switch:\n" body                                                               \
      ".size mpkernels_fibres_switch,.-mpkernels_fibres_switch\n"                                     \
      ".popsection\n")

#if defined(__x86_64__)
MPKERNELS_FIBRES_ASSEMBLY(
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  subq $8, %rsp\n  stmxcsr (%rsp)\n  fnstcw 4(%rsp)\n"  // rounding modes of SSE and x87
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  ldmxcsr (%rsp)\n  fldcw 4(%rsp)\n  addq $8, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
#else
MPKERNELS_FIBRES_ASSEMBLY(
    "  sub sp, sp, #176\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mrs x9, fpcr\n  str x9, [sp, #160]\n"
    "  mov x9, sp\n  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldr x9, [sp, #160]\n  msr fpcr, x9\n"
    "  ldp d14, d15, [sp, #144]\n  ldp d12, d13, [sp, #128]\n  ldp d10, d11, [sp, #112]\n  ldp d8, d9, [sp, #96]\n"
    "  ldp x29, x30, [sp, #80]\n  ldp x27, x28, [sp, #64]\n  ldp x25, x26, [sp, #48]\n"
    "  ldp x23, x24, [sp, #32]\n  ldp x21, x22, [sp, #16]\n  ldp x19, x20, [sp, #0]\n"
    "  add sp, sp, #176\n"
    "  ret\n");
#endif
#undef MPKERNELS_FIBRES_ASSEMBLY
#endif

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {

  struct Stack {
    char* low = nullptr;  // the guard page lies below
    std::size_t size = 0;
  };

  // Stacks are kept between launches: making one costs system calls and page faults.
  class StackPool {
   public:
    // Never destroyed, because a launch may run while static objects are being destroyed.
    static StackPool& instance() {
      static StackPool* pool = new StackPool;
      return *pool;
    }

    std::vector<Stack> acquire(std::size_t count, std::size_t size) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (size != size_) {  // only when the environment changed
        for (const Stack& stack : free_) release_memory(stack);
        free_.clear();
        size_ = size;
      }
      while (free_.size() < count) free_.push_back(allocate(size));
      std::vector<Stack> stacks(free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
      free_.resize(free_.size() - count);
      return stacks;
    }

    void release(const std::vector<Stack>& stacks) {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const Stack& stack : stacks) {
        if (stack.size == size_) {
          free_.push_back(stack);
        } else {
          release_memory(stack);
        }
      }
    }

   private:
    static std::size_t page_size() {
      static const std::size_t size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
      return size;
    }

    static Stack allocate(std::size_t size) {
      const std::size_t guard = page_size();
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* memory = mmap(nullptr, size + guard, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, guard, PROT_NONE);
      return {static_cast<char*>(memory) + guard, size};
    }

    static void release_memory(const Stack& stack) { munmap(stack.low - page_size(), stack.size + page_size()); }

    std::mutex mutex_;
    std::vector<Stack> free_;
    std::size_t size_ = 0;
  };

  // A place where execution stopped: the OS thread's own stack (default constructed), or a fibre (after `start`).
  class Context {
   public:
    // The first switch to this context calls entry(), which must never return. Stacks of neighbours start at different
    // offsets in a page (colour), or they would compete for the same few cache lines.
    void start(const Stack& stack, void (*entry)(), unsigned colour) {
      bounds_.low = stack.low;
      bounds_.size = stack.size;
      char* top = stack.low + stack.size - 64 * (colour % 64);
#if defined(MPKERNELS_FIBRES_USE_UCONTEXT)
      getcontext(&context_);
      context_.uc_stack.ss_sp = stack.low;
      context_.uc_stack.ss_size = static_cast<std::size_t>(top - stack.low);
      context_.uc_link = nullptr;
      makecontext(&context_, entry, 0);
#elif defined(__x86_64__)
      // What the switch pops: control words, six registers and a return address; above it a return address of zero,
      // where stack traces end, which leaves the stack aligned as after a call.
      std::uintptr_t frame[9] = {};
      std::uint32_t control_words[2] = {};
      asm volatile("stmxcsr %0" : "=m"(control_words[0]));
      asm volatile("fnstcw %0" : "=m"(control_words[1]));
      std::memcpy(&frame[0], control_words, sizeof(control_words));
      frame[7] = reinterpret_cast<std::uintptr_t>(entry);
      stack_pointer_ = top - sizeof(frame);
      std::memcpy(stack_pointer_, frame, sizeof(frame));
#else
      std::uint64_t frame[22] = {};
      frame[11] = reinterpret_cast<std::uint64_t>(entry);  // x30, the return address
      asm volatile("mrs %0, fpcr" : "=r"(frame[20]));
      stack_pointer_ = top - sizeof(frame);
      std::memcpy(stack_pointer_, frame, sizeof(frame));
#endif
    }

    // Stops here and continues `next`; returns when somebody switches back.
    void switch_to(Context& next) {
      sanitizers::before_switch(&fake_stack_, next.bounds_);
      raw_switch(next);
      sanitizers::after_switch(fake_stack_, nullptr);
    }

    // The first thing a new fibre does, naming the context that started it.
    static void entered_from(Context& starter) { sanitizers::after_switch(nullptr, &starter.bounds_); }

    // The last thing a fibre does.
    [[noreturn]] void finish_and_switch_to(Context& next) {
      sanitizers::before_switch(nullptr, next.bounds_);
      raw_switch(next);
      __builtin_unreachable();
    }

   private:
    void raw_switch(Context& next) {
#if defined(MPKERNELS_FIBRES_USE_UCONTEXT)
      swapcontext(&context_, &next.context_);
#else
      mpkernels_fibres_switch(&stack_pointer_, next.stack_pointer_);
#endif
    }

#if defined(MPKERNELS_FIBRES_USE_UCONTEXT)
    ucontext_t context_;
#else
    void* stack_pointer_ = nullptr;
#endif
    void* fake_stack_ = nullptr;  // AddressSanitizer's
    sanitizers::StackBounds bounds_;
  };

}  // namespace fibres
}  // namespace mpkernels
