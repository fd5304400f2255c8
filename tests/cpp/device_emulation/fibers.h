// Functions that run in turns, each on a stack of its own. An emulated kernel changes fibers tens of millions of times:
// swapcontext() would enter the operating system for each and, under AddressSanitizer, clear the shadow of both stacks.
#pragma once

#include <sanitizer/asan_interface.h>

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace heed::device_emulation {

#if defined(__x86_64__)

struct Fiber {
  void* stack_pointer = nullptr;  // while another one runs; what a function call preserves lies there
};

// Returns when somebody switches back to `from`. Not inlined: to the compiler it is a call like any other.
__attribute__((naked, noinline, used)) inline void switch_fiber(Fiber& /*from*/, Fiber& /*to*/) {
  asm("pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq (%rsi), %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret");
}

// The next switch to `fiber` calls `body`, which never returns.
inline void start_fiber(Fiber& fiber, char* stack, size_t bytes, void (*body)()) {
  // What ran here before never returned: its frames' redzones are still marked.
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);
  auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16);
  *--top = 0;  // where a return address would be: the stack is aligned as after a call
  *--top = reinterpret_cast<uintptr_t>(body);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the registers that switch_fiber pops
  fiber.stack_pointer = top;
}

#else

struct Fiber {
  ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

inline void start_fiber(Fiber& fiber, char* stack, size_t bytes, void (*body)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  makecontext(&fiber.context, body, 0);
}

#endif

}  // namespace heed::device_emulation
