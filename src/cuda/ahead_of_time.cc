// The ahead-of-time list, family by family.
#include "cuda/ahead_of_time.h"

#include <utility>

#include "cuda/jit/sources.h"
#include "cuda/sm80_act_and_mul.h"
#include "cuda/sm80_attention_bwd.h"
#include "cuda/sm80_attention_decode.h"
#include "cuda/sm80_attention_fwd.h"
#include "cuda/sm80_rms_norm.h"
#include "cuda/sm80_rope.h"
#include "cuda/sm90_attention_fwd.h"

namespace heed::cuda {

std::vector<KernelSpec> ahead_of_time_list(const std::string& arch) {
  check_arch(arch);
  std::vector<KernelSpec> list;
  list.push_back({"probe", "Probe<256>"});  // what `python -m heed doctor` launches
  for (const auto& common_specs :
       {sm80_attention_fwd_common_specs, sm80_attention_bwd_common_specs, sm80_attention_decode_common_specs,
        sm80_act_and_mul_common_specs, sm80_rope_common_specs, sm80_rms_norm_common_specs}) {
    for (KernelSpec& spec : common_specs()) list.push_back(std::move(spec));
  }
  if (arch == "sm_90a") {
    for (KernelSpec& spec : sm90_attention_fwd_common_specs()) list.push_back(std::move(spec));
  }
  return list;
}

}  // namespace heed::cuda
