// The modules of heed.jit: gated activations, rotary embeddings and attention of one query as functions with the names
// and the parameter orders of FlashInfer's modules. They check all arguments, run on the stream that TVM-FFI holds for
// the device, and allocate no tensor memory.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <array>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/small_problems.h"
#include "core/target.h"
#include "cuda/device_target.h"
#include "cuda/jit/jit.h"
#include "ffi/arguments.h"
#include "ffi/jit_module.h"
#include "ffi/overlap.h"
#include "ops/act_and_mul.h"
#include "ops/attention_decode.h"
#include "ops/every_kernel.h"
#include "ops/rope.h"

namespace heed::ffi {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Calls.

template <class Op, class Request>
std::shared_ptr<const PreparedOp<Op>> prepare(const Request& request, Device device) {
  return Op::prepare(to_text(request), target_of(device));
}

template <class Op>
void run(const PreparedOp<Op>& prepared, typename Op::Args& args) {
  const Device device = device_of<Op>(args);
  if (device.type == DeviceType::kCpu) {
    Op::run(prepared, args);
    return;
  }
  args.stream = TVMFFIEnvGetStream(kDLCUDA, device.index);
  const cuda::DeviceScope scope(device.index);  // the default stream is that of the current context
  Op::run(prepared, args);
}

// Finds or compiles the kernels of the requests and loads them on every GPU of this machine, so that calls only launch.
// A GPU that heed does not serve is left out: calls there say why.
template <class Op, class Request>
void load_on_all_devices(const std::vector<Request>& requests) {
  for (int device = 0; device < cuda::device_count(); ++device) {
    for (const Request& request : requests) {
      try {
        Op::load(*Op::prepare(to_text(request), cuda_target(device)), device);
      } catch (const UnsupportedError&) {
        break;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Values of indices that are in host memory.

// Calls check(values, stride) for each row of the last axis of an int32 tensor in host memory. Does nothing where there
// is no memory to read.
template <class Check>
void for_each_host_row(const TensorView& view, const Check& check) {
  if (view.device.type != DeviceType::kCpu || view.data == nullptr) return;
  const int last = view.rank - 1;
  std::array<int64_t, kMaxRank> index{};
  for (int axis = 0; axis <= last; ++axis) {
    if (view.shape[axis] == 0) return;
  }
  for (int axis = 0; axis >= 0;) {
    int64_t offset = 0;
    for (int i = 0; i < last; ++i) offset += index[i] * view.strides[i];
    check(static_cast<const int32_t*>(view.data) + offset, view.strides[last]);
    for (axis = last - 1; axis >= 0 && ++index[axis] == view.shape[axis]; --axis) index[axis] = 0;
  }
}

void check_indptr_values(const TensorView& indptr, int64_t num_tokens) {
  const int64_t num_ends = indptr.shape[indptr.rank - 1];
  for_each_host_row(indptr, [&](const int32_t* values, int64_t stride) {
    int64_t before = 0;
    for (int64_t i = 0; i < num_ends; ++i) {
      const int64_t value = values[i * stride];
      const std::string got = "indptr: got " + std::to_string(value) + " at index " + std::to_string(i);
      if (i == 0 && value < 0) throw ValueError(got + ", expected 0 or more");
      if (value < before) {
        throw ValueError(got + " after " + std::to_string(before) + ", expected values that do not decrease");
      }
      if (value > num_tokens) {
        throw ValueError(got + ", expected at most " + std::to_string(num_tokens) + ", the tokens of q");
      }
      before = value;
    }
  });
}

void check_position_values(const TensorView& pos_ids, int64_t max_position) {
  const int64_t num_tokens = pos_ids.shape[pos_ids.rank - 1];
  for_each_host_row(pos_ids, [&](const int32_t* values, int64_t stride) {
    for (int64_t i = 0; i < num_tokens; ++i) {
      const int64_t value = values[i * stride];
      if (value >= 0 && value < max_position) continue;
      throw ValueError("pos_ids: got " + std::to_string(value) + " at index " + std::to_string(i) +
                       ", expected rows of cos_sin_cache, 0 to " + std::to_string(max_position - 1));
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Gated activations.

tvm::ffi::Module act_and_mul_module(const std::string& name) {
  int index = 0;
  while (index < 3 && kActivationNames[index] != name) ++index;
  if (index == 3) throw ValueError("act_func_name: got " + name + ", expected silu, gelu or gelu_tanh");
  const auto activation = static_cast<Activation>(index);

  const auto call = [activation](Arguments arguments) {
    ActAndMulArgs args;
    args.out = float_argument(arguments[0], "out");
    args.x = float_argument(arguments[1], "x");
    flag_argument(arguments[2], "enable_pdl");
    ActAndMulRequest request{.activation = activation};
    set_operands<ActAndMulOp>(request, args);
    const auto prepared = prepare<ActAndMulOp>(request, args.x.device);
    check_memory({{"input", args.x}}, {{"out", args.out}});
    run(*prepared, args);
  };

  load_on_all_devices<ActAndMulOp>(requests_of_every_kernel(activation));
  return make_module({{name + "_and_mul", {"out", "input", "enable_pdl"}, {{"x", "input"}}, call}});
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotary embeddings.

// The tensors that all its functions begin with.
RopeArgs first_rope_arguments(Arguments arguments) {
  RopeArgs args;
  args.q = float_argument(arguments[0], "q");
  args.k = float_argument(arguments[1], "k");
  args.q_rope = float_argument(arguments[2], "q_rope");
  args.k_rope = float_argument(arguments[3], "k_rope");
  return args;
}

void set_frequencies(RopeOptions& options, Arguments arguments) {
  options.rotary_dim = integer_argument(arguments[0], "rotary_dim");
  options.interleave = flag_argument(arguments[1], "interleave");
  options.scale = real_argument(arguments[2], "rope_scale");
  options.theta = real_argument(arguments[3], "rope_theta");
}

void run_rope(RopeArgs& args, const RopeOptions& options) {
  RopeRequest request{.options = options};
  set_operands<RopeOp>(request, args);
  const auto prepared = prepare<RopeOp>(request, args.q.device);
  const RopeProblem& problem = prepared->problem;
  if (!problem.has_pos_ids) check_indptr_values(args.indptr, problem.num_tokens);
  if (problem.has_cache) check_position_values(args.pos_ids, problem.max_position);
  check_memory({{"q", args.q},
                {"k", args.k},
                {"indptr", args.indptr},
                {"offsets", args.offsets},
                {"pos_ids", args.pos_ids},
                {"cos_sin_cache", args.cos_sin_cache}},
               {{"q_rope", args.q_rope, "q"}, {"k_rope", args.k_rope, "k"}});
  run(*prepared, args);
}

void apply_rope(Arguments arguments) {
  RopeArgs args = first_rope_arguments(arguments);
  args.indptr = index_argument(arguments[4], "indptr");
  args.offsets = index_argument(arguments[5], "offsets");
  RopeOptions options;
  set_frequencies(options, arguments.subspan(6));
  if (arguments.size() > 10) {
    options.is_llama31 = true;
    options.low_freq_factor = real_argument(arguments[10], "low_freq_factor");
    options.high_freq_factor = real_argument(arguments[11], "high_freq_factor");
    options.old_context_len = real_argument(arguments[12], "old_context_len");
  }
  run_rope(args, options);
}

void apply_rope_pos_ids(Arguments arguments) {
  RopeArgs args = first_rope_arguments(arguments);
  args.pos_ids = index_argument(arguments[4], "pos_ids");
  RopeOptions options;
  set_frequencies(options, arguments.subspan(5));
  run_rope(args, options);
}

void apply_rope_with_cos_sin_cache(Arguments arguments) {
  RopeArgs args = first_rope_arguments(arguments);
  args.cos_sin_cache = float_argument(arguments[4], "cos_sin_cache");
  args.pos_ids = index_argument(arguments[5], "pos_ids");
  run_rope(args, {.interleave = flag_argument(arguments[6], "interleave")});
}

tvm::ffi::Module rope_module() {
  using Names = std::vector<std::string>;
  const auto parameters = [](const Names& positions, const Names& more = {}) {
    Names names = {"q", "k", "q_rope", "k_rope"};
    names.insert(names.end(), positions.begin(), positions.end());
    names.insert(names.end(), {"rotary_dim", "interleave", "rope_scale", "rope_theta"});
    names.insert(names.end(), more.begin(), more.end());
    return names;
  };
  load_on_all_devices<RopeOp>(rope_requests_of_every_kernel());
  return make_module({
      {"apply_rope", parameters({"indptr", "offsets"}), {}, apply_rope},
      {"apply_llama31_rope",
       parameters({"indptr", "offsets"}, {"low_freq_factor", "high_freq_factor", "old_context_len"}),
       {},
       apply_rope},
      {"apply_rope_pos_ids", parameters({"pos_ids"}), {}, apply_rope_pos_ids},
      {"apply_rope_with_cos_sin_cache",
       {"q", "k", "q_rope", "k_rope", "cos_sin_cache", "pos_ids", "interleave"},
       {},
       apply_rope_with_cos_sin_cache},
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of one query.

// FlashInfer's codes of position encodings.
enum PositionEncoding : int64_t { kNone, kRope, kAlibi, kNumPositionEncodings };

// What a module was made for.
struct DecodeModule {
  DType dtype{};
  int64_t head_dim_qk = 0, head_dim_vo = 0;
  int64_t position_encoding = kNone;
};

void check_is_of_module(const DecodeModule& module, std::string_view name, const TensorView& view, int64_t head_dim) {
  const std::string tensor(name);
  if (view.dtype != module.dtype) {
    throw TypeError(tensor + ": got dtype " + std::string(info(view.dtype).name) + ", expected " +
                    std::string(info(module.dtype).name) + ", which the module was made for");
  }
  if (view.rank > 0 && view.shape[view.rank - 1] != head_dim) {
    throw ValueError(tensor + ": got head dim " + std::to_string(view.shape[view.rank - 1]) + ", expected " +
                     std::to_string(head_dim) + ", which the module was made for");
  }
}

// Scratch memory of any dtype and shape, as the kernel's workspace.
TensorView workspace_argument(const TVMFFIAny& argument, int64_t bytes_needed, Device device_of_q) {
  const DLTensor& tensor = *tensor_argument(argument, "tmp");
  const Device device{is_on_cuda(tensor) ? DeviceType::kCuda : DeviceType::kCpu, tensor.device.device_id};
  // Even where it is not needed, so that a program that is wrong does not work by chance.
  if (!(device == device_of_q)) throw ValueError("tmp: got another device than q, expected the device of q");
  int64_t count = 1;
  int64_t stride = 1;
  bool is_contiguous = true;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const bool has_any_stride = tensor.strides == nullptr || tensor.shape[i] == 1;
    is_contiguous = is_contiguous && (has_any_stride || tensor.strides[i] == stride);
    stride *= tensor.shape[i];
    count *= tensor.shape[i];
  }
  const int64_t bytes = count * ((tensor.dtype.bits * tensor.dtype.lanes + 7) / 8);
  if (bytes < bytes_needed) {
    throw ValueError("tmp: got " + std::to_string(bytes) + " bytes, expected at least " + std::to_string(bytes_needed) +
                     " for this call");
  }
  if (bytes_needed == 0) return {};
  if (!is_contiguous) throw ValueError("tmp: got strides with gaps, expected contiguous memory");
  return TensorView::contiguous(static_cast<char*>(tensor.data) + tensor.byte_offset, DType::kFloat32,
                                {bytes_needed / 4}, device);
}

// 1 / value, for a slot that holds a reciprocal. Both are numbers that float32 holds.
double reciprocal_argument(const TVMFFIAny& argument, std::string_view name) {
  const double value = real_argument(argument, name);
  constexpr double kLargest = std::numeric_limits<float>::max();
  if (!(value >= 1.0 / kLargest && value <= kLargest)) {
    std::ostringstream got;
    got << value;
    throw ValueError(std::string(name) + ": got " + got.str() +
                     ", expected a positive number whose reciprocal is finite in float32");
  }
  return 1.0 / value;
}

SingleDecodeOptions decode_options(const DecodeModule& module, Arguments arguments) {
  SingleDecodeOptions options;
  const int64_t layout = integer_argument(arguments[6], "kv_layout_code");
  if (layout != 0 && layout != 1) {
    throw ValueError("kv_layout_code: got " + std::to_string(layout) + ", expected 0 (NHD) or 1 (HND)");
  }
  options.kv_layout = static_cast<KvLayout>(layout);
  options.window_left = integer_argument(arguments[7], "window_left");
  options.softcap = real_argument(arguments[9], "softcap");
  options.sm_scale = real_argument(arguments[10], "sm_scale");
  if (module.position_encoding == kRope) {
    options.rope_scale = reciprocal_argument(arguments[11], "rope_rcp_scale");
    options.rope_theta = reciprocal_argument(arguments[12], "rope_rcp_theta");
  } else {
    real_argument(arguments[11], "rope_rcp_scale");
    real_argument(arguments[12], "rope_rcp_theta");
  }
  return options;
}

// An operand that is absent has leading axes all the same, and may be the only one that has them in full. Gives them to
// q, as axes that broadcast.
void expand_to_leads_of_absent(TensorView& q, const TVMFFIAny& argument, std::string_view name) {
  if (argument.type_index == kTVMFFINone) return;
  const DLTensor& absent = *tensor_argument(argument, name);
  constexpr int kOwnAxesOfQ = 2;
  if (absent.ndim == 1 || absent.ndim - 1 != q.rank - kOwnAxesOfQ) return;
  for (int axis = 0; axis < absent.ndim - 1; ++axis) {
    const int64_t size = absent.shape[axis];
    if (size == 1 || size == q.shape[axis]) continue;
    if (q.shape[axis] != 1) {
      throw ValueError(std::string(name) + ": got leading axis " + std::to_string(axis) + " of size " +
                       std::to_string(size) + ", expected size " + std::to_string(q.shape[axis]) + " or 1");
    }
    q.shape[axis] = size;
    q.strides[axis] = 0;
  }
}

void run_decode(const DecodeModule& module, Arguments arguments) {
  SingleDecodeArgs args;
  args.q = float_argument(arguments[0], "q");
  args.k = float_argument(arguments[1], "k");
  args.v = float_argument(arguments[2], "v");
  args.out = float_argument(arguments[4], "out");
  if (!is_absent(arguments[5])) args.lse = float_argument(arguments[5], "lse");
  if (is_absent(arguments[8])) {
    expand_to_leads_of_absent(args.q, arguments[8], "alibi_slopes");
  } else {
    args.alibi_slopes = float_argument(arguments[8], "alibi_slopes");
  }
  check_is_of_module(module, "q", args.q, module.head_dim_qk);
  check_is_of_module(module, "k", args.k, module.head_dim_qk);
  check_is_of_module(module, "v", args.v, module.head_dim_vo);
  if (module.position_encoding == kAlibi && !args.alibi_slopes.defined()) {
    throw ValueError("alibi_slopes: got nothing, expected a tensor: the module was made with pos_encoding_mode 2");
  }
  AttentionDecodeRequest request{.options = decode_options(module, arguments), .wants_lse = args.lse.defined()};
  set_operands<AttentionDecodeOp>(request, args);
  const auto prepared = prepare<AttentionDecodeOp>(request, args.q.device);
  args.workspace = workspace_argument(arguments[3], prepared->workspace_bytes, args.q.device);
  check_memory({{"q", args.q}, {"k", args.k}, {"v", args.v}, {"maybe_alibi_slopes", args.alibi_slopes}},
               {{"out", args.out}, {"maybe_lse", args.lse}, {"tmp", args.workspace}});
  run(*prepared, args);
}

tvm::ffi::Module single_decode_module(std::string_view dtype_name, int64_t head_dim_qk, int64_t head_dim_vo,
                                      int64_t position_encoding) {
  const DTypeInfo* dtype = find_dtype(dtype_name);
  if (dtype == nullptr || !dtype->is_float) {
    throw TypeError("dtype_q: got " + std::string(dtype_name) + ", expected float32, float16 or bfloat16");
  }
  if (position_encoding < 0 || position_encoding >= kNumPositionEncodings) {
    throw ValueError("pos_encoding_mode: got " + std::to_string(position_encoding) +
                     ", expected 0 (none), 1 (rotary embeddings) or 2 (ALiBi)");
  }
  const DecodeModule module{dtype->dtype, head_dim_qk, head_dim_vo, position_encoding};
  load_on_all_devices<AttentionDecodeOp>(
      decode_requests_of_every_kernel(module.dtype, head_dim_qk, head_dim_vo, position_encoding == kRope));
  return make_module({{"run",
                       {"q", "k", "v", "tmp", "out", "maybe_lse", "kv_layout_code", "window_left", "maybe_alibi_slopes",
                        "logits_soft_cap", "sm_scale", "rope_rcp_scale", "rope_rcp_theta"},
                       {{"lse", "maybe_lse"},
                        {"alibi_slopes", "maybe_alibi_slopes"},
                        {"softcap", "logits_soft_cap"},
                        {"rope_scale", "rope_rcp_scale"},
                        {"rope_theta", "rope_rcp_theta"},
                        {"workspace", "tmp"}},
                       [module](Arguments arguments) { run_decode(module, arguments); }}});
}

}  // namespace
}  // namespace heed::ffi

namespace {

namespace ffi = heed::ffi;

void check_count(int32_t num_args, int32_t num_expected) {
  if (num_args == num_expected) return;
  throw heed::TypeError("heed.jit: got " + std::to_string(num_args) + " parameters of a module, expected " +
                        std::to_string(num_expected));
}

int make(TVMFFIAny* result, tvm::ffi::Module (*make_one)(const TVMFFIAny*), const TVMFFIAny* args, int32_t num_args,
         int32_t num_expected) {
  return ffi::guarded([&] {
    check_count(num_args, num_expected);
    *reinterpret_cast<tvm::ffi::Any*>(result) = make_one(args);
  });
}

}  // namespace

extern "C" {

// act_and_mul_module(activation), rope_module(), single_decode_module(dtype, head_dim_qk, head_dim_vo, position
// encoding) -> the module, its kernels ready on every GPU of this machine.
TVM_FFI_DLL_EXPORT int __tvm_ffi_act_and_mul_module(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                    TVMFFIAny* result) {
  const auto make_one = [](const TVMFFIAny* arguments) {
    return ffi::act_and_mul_module(std::string(ffi::string_argument(arguments[0], "act_func_name")));
  };
  return make(result, make_one, args, num_args, 1);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_rope_module(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                             TVMFFIAny* result) {
  return make(
      result, [](const TVMFFIAny* /*arguments*/) { return ffi::rope_module(); }, args, num_args, 0);
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_single_decode_module(void* /*self*/, const TVMFFIAny* args, int32_t num_args,
                                                      TVMFFIAny* result) {
  const auto make_one = [](const TVMFFIAny* arguments) {
    return ffi::single_decode_module(
        ffi::string_argument(arguments[0], "dtype_q"), ffi::integer_argument(arguments[1], "head_dim_qk"),
        ffi::integer_argument(arguments[2], "head_dim_vo"), ffi::integer_argument(arguments[3], "pos_encoding_mode"));
  };
  return make(result, make_one, args, num_args, 4);
}

}  // extern "C"
