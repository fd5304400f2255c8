// What the CPU kernels of gated activations are told, whatever the instruction set.
#pragma once

#include "cpu/map_rows.h"
#include "heed/ops.h"

namespace heed::cpu {

// Forward: gate, up -> out. Backward: gate, up, dout -> dgate, dup. Gates are the first half of x's last axis, ups the
// second; likewise in dx.
template <size_t kIn, size_t kOut>
struct ActPlan {
  DType dtype;
  Activation activation;
  MapPlan<kIn, kOut> map;
};

}  // namespace heed::cpu
