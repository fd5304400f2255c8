// Attention sinks: one raw logit per query head (neither scaled nor capped) that joins the softmax denominator and
// carries no value. `finish_row` is the end of every online softmax, with or without a sink.
#pragma once

#include "variants/host_device.h"

namespace heed::variants {

// The end of a row: its output is the accumulated one over `divisor`, its lse is top + (rest + log(total)).
template <class Real>
struct RowEnd {
  Real divisor;
  Real top;
  Real rest;
  Real total;
};

// `max`: the row's largest score in natural units, -inf if every key is masked. `sum`: sum of exp(score - max - rest),
// where `rest` is what rounding did to the reference of the exponentials.
// Real: double, or float on a GPU; `exp` is that type's function. Infinite and NaN sinks follow IEEE arithmetic.
template <class Real, class Exp>
HEED_HOST_DEVICE inline RowEnd<Real> finish_row(Real max, Real rest, Real sum, bool has_sink, Real sink,
                                                const Exp& exp) {
  if (sum == 0 && (!has_sink || sink == max)) return {1, max, 0, 1};  // no visible key (and a sink of -inf, if any)
  if (!has_sink) return {sum, max, rest, sum};
  // The larger of both is taken out of the exponentials, so that neither overflows.
  const bool is_sink_larger = sink > max;
  const Real top = is_sink_larger ? sink : max;
  const Real top_rest = is_sink_larger ? 0 : rest;
  const Real shrink = is_sink_larger ? exp((max - top) + rest) : 1;
  const Real total = sum * shrink + exp((sink - top) - top_rest);
  // With a sink far above every score the divisor is infinite, the output 0.
  return {total / shrink, top, top_rest, total};
}

}  // namespace heed::variants
