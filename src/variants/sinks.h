// Attention sinks: one raw logit per query head (neither scaled nor capped) that joins the softmax denominator and
// carries no value. `finish_row` is the end of every online softmax, with or without a sink.
#pragma once

#include "variants/host_device.h"

namespace heed::variants {

// The end of a row: its output is the accumulated one over `divisor`, its lse is top + log(total).
template <class Real>
struct RowEnd {
  Real divisor;
  Real top;
  Real total;
};

// `max`: the row's largest score in natural units, -inf if every key is masked. `sum`: sum of exp(score - max).
// Real: double, or float on a GPU; `exp` is that type's function. Infinite and NaN sinks follow IEEE arithmetic.
template <class Real, class Exp>
HEED_HOST_DEVICE inline RowEnd<Real> finish_row(Real max, Real sum, bool has_sink, Real sink, const Exp& exp) {
  if (sum == 0 && (!has_sink || sink == max)) return {1, max, 1};  // no visible key (and a sink of -inf, if any)
  if (!has_sink) return {sum, max, sum};
  // The larger of both is taken out of the exponentials, so that neither overflows.
  const Real top = sink > max ? sink : max;
  const Real shrink = max == top ? 1 : exp(max - top);
  const Real total = sum * shrink + exp(sink - top);
  return {total / shrink, top, total};  // with a sink far above every score the divisor is infinite, the output 0
}

}  // namespace heed::variants
