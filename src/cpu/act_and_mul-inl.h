// The CPU kernels of gated activations for one instruction set. See act_and_mul.cc.
#include "cpu/simd.h"
#include "hwy/highway.h"

#if defined(HEED_CPU_ACT_AND_MUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_ACT_AND_MUL_INL_H_
#undef HEED_CPU_ACT_AND_MUL_INL_H_
#else
#define HEED_CPU_ACT_AND_MUL_INL_H_
#endif

#include "cpu/act_and_mul_plan.h"
#include "cpu/activation-inl.h"
#include "cpu/map_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// gate, up -> out.
template <class Activation>
struct ActAndMul {
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE void apply(D d, const V* HWY_RESTRICT in, V* HWY_RESTRICT out) {
    out[0] = hn::Mul(Activation::value(d, in[0]), in[1]);
  }
};

// gate, up, dout -> dgate, dup: dout * up * (w + gate * w'), dout * gate * w, with w = weight(gate).
template <class Activation>
struct ActAndMulBackward {
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE void apply(D d, const V* HWY_RESTRICT in, V* HWY_RESTRICT out) {
    const V gate = in[0];
    const auto weight = Activation::weight(d, gate);
    const V slope = hn::MulAdd(gate, Activation::slope(d, gate, weight), weight.scaled);
    out[0] = hn::Mul(in[2], hn::Mul(in[1], hn::Mul(slope, weight.unscale)));
    out[1] = hn::Mul(in[2], hn::Mul(hn::Mul(gate, weight.scaled), weight.unscale));
  }
};

template <template <class> class Op, size_t kIn, size_t kOut>
void act_run(const ActPlan<kIn, kOut>& plan) {
  with_storage(plan.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    switch (plan.activation) {
      case Activation::kSilu:
        return map_rows<Storage, Op<SiluVector>>(plan.map);
      case Activation::kGelu:
        return map_rows<Storage, Op<GeluVector>>(plan.map);
      case Activation::kGeluTanh:
        return map_rows<Storage, Op<GeluTanhVector>>(plan.map);
    }
  });
}

void act_and_mul_run(const ActPlan<2, 1>& plan) { act_run<ActAndMul>(plan); }
void act_and_mul_bwd_run(const ActPlan<3, 2>& plan) { act_run<ActAndMulBackward>(plan); }

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // HEED_CPU_ACT_AND_MUL_INL_H_
