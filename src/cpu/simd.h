// Highway's configuration and the choice of the instruction set. Include this before any Highway header, and dispatch
// with HEED_DYNAMIC_DISPATCH instead of Highway's macro: the choice is ours (HEED_CPU_TARGET), not the process's.
#pragma once

#include <string>
#include <string_view>
#include <vector>

// Every target from the scalar fallback to the best one is built, so that each can be forced and tested.
#ifndef HWY_COMPILE_ALL_ATTAINABLE
#define HWY_COMPILE_ALL_ATTAINABLE
#endif
// Kernels keep arrays of vectors in registers, which scalable vectors do not allow.
#ifndef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
#endif
#include "hwy/targets.h"

#if defined(__clang__)
#define HEED_UNROLL _Pragma("clang loop unroll(full)")
#else
#define HEED_UNROLL _Pragma("GCC unroll 32")
#endif

namespace heed::cpu {

// The target in use: HEED_CPU_TARGET, else the best that this CPU runs. Throws ValueError, at every call, if
// HEED_CPU_TARGET names a target that this build does not contain or this CPU does not run.
const hwy::ChosenTarget& chosen_target();

// For tests: uses the target of that name from now on (empty: as at start). Not while kernels run.
void force_target(std::string_view name);

}  // namespace heed::cpu

// A pointer to the function exported with HWY_EXPORT, for the target in use.
#define HEED_DYNAMIC_DISPATCH(FUNCTION) (*HWY_DISPATCH_TABLE(FUNCTION)[::heed::cpu::chosen_target().GetIndex()])
