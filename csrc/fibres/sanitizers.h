// What AddressSanitizer must be told about fibres, and how its reports come to name the CUDA thread.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define MPKERNELS_FIBRES_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MPKERNELS_FIBRES_ADDRESS_SANITIZER 1
#endif
#endif

#if defined(MPKERNELS_FIBRES_ADDRESS_SANITIZER)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, std::size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, std::size_t* size_old);
void __asan_set_error_report_callback(void (*callback)(const char*));
}
#endif
#if defined(__linux__)
#include <dlfcn.h>
// Present if some sanitizer is linked. UndefinedBehaviorSanitizer alone leaves no trace in the preprocessor.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
#endif

namespace mpkernels {
namespace fibres __attribute__((visibility("hidden"))) {
  namespace sanitizers {

  struct StackBounds {
    const void* low = nullptr;
    std::size_t size = 0;
  };

  inline void before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const StackBounds& next) {
#if defined(MPKERNELS_FIBRES_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(fake_stack, next.low, next.size);
#endif
  }

  inline void after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] StackBounds* previous) {
#if defined(MPKERNELS_FIBRES_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(fake_stack, previous ? &previous->low : nullptr,
                                    previous ? &previous->size : nullptr);
#endif
  }

  // Has `name_thread` called when a sanitizer has reported an error: after the report of AddressSanitizer, and before
  // the process ends on a report of UndefinedBehaviorSanitizer that is not recovered from.
  inline void call_on_report([[maybe_unused]] void (*name_thread)()) {
#if defined(MPKERNELS_FIBRES_ADDRESS_SANITIZER)
    static void (*reported)() = nullptr;
    reported = name_thread;
    __asan_set_error_report_callback([](const char*) { reported(); });
#endif
#if defined(__linux__)
    // gcc links a second runtime for UndefinedBehaviorSanitizer, whose function of this name is hidden by the first.
    if (void* library = dlopen("libubsan.so.1", RTLD_LAZY | RTLD_NOLOAD)) {
      using SetCallback = void (*)(void (*)());
      if (auto set_callback = reinterpret_cast<SetCallback>(dlsym(library, "__sanitizer_set_death_callback"))) {
        set_callback(name_thread);
      }
    } else if (__sanitizer_set_death_callback) {
      __sanitizer_set_death_callback(name_thread);
    }
#endif
  }

  }  // namespace sanitizers
}  // namespace fibres
}  // namespace mpkernels
