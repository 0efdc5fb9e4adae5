// GPU twins of the CPU operators, named and called alike. All work goes to the current stream of
// the tensors' device; nothing waits for it, reads from it or allocates, so a CUDA graph can hold a
// call.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tensor.h"

namespace gradsurgery {

using Sources = std::vector<std::vector<Tensor>>;  // [source][block], [m_s, n_k] each

// How many float64 of scratch each launcher below needs.
std::int64_t gramian_scratch(std::int64_t m);
std::int64_t orthonormalize_scratch(std::int64_t batch, std::int64_t m);
// problem: projection, cone, conflict_averse, deconflict, bargaining or eigen; count of them.
std::int64_t weighting_scratch(const std::string& problem, std::int64_t count, std::int64_t m);

// `repeat`: products that left float32's range are made again, in float64.
void gramian_cuda(const Sources& sources, const Tensor& out, const Tensor& scratch, bool precise,
                  bool repeat);
// The products of the last row with all rows, in float64: the last row and column of the Gramian
// `out`, [m, m]. Scratch as for that.
void gramian_border_cuda(const Sources& sources, const Tensor& out, const Tensor& scratch);

// As combine() in combine.h, but without a verdict on the outs, which would wait for the GPU: what
// is not finite propagates. `scratch`, that of a Gramian of m + p rows, goes with `cross` or
// `gram`. More than four outs may be rows only if `weights` is lower triangular.
void combine_cuda(const Sources& sources, const Tensor& weights, const Sources& outs,
                  const std::optional<Tensor>& cross, const std::optional<Tensor>& gram,
                  const std::optional<Tensor>& scratch);

void projection_weights_cuda(const Tensor& gramian, const Tensor& products,
                             const Tensor& coefficients, const Tensor& rank, const Tensor& margin,
                             const Tensor& scratch, double rtol);
void cone_weights_cuda(const Tensor& gramian, const Tensor& products, const Tensor& coefficients,
                       const Tensor& residual, const Tensor& scratch, double rtol, double noise);
void conflict_averse_weights_cuda(const Tensor& gramian, const Tensor& weights,
                                  const Tensor& scratch, double c, double rtol, double noise);
void deconflict_weights_cuda(const Tensor& gramian, const Tensor& order,
                             const std::optional<Tensor>& targets, const Tensor& coefficients,
                             const Tensor& scratch, double beta);
void bargaining_weights_cuda(const Tensor& gramian, const Tensor& weights, const Tensor& scratch,
                             double power, double rtol);
void eigen_cuda(const Tensor& gramian, const Tensor& values, const Tensor& vectors,
                const Tensor& scratch);

void orthonormalize_cuda(const Tensor& rows, const Tensor& q, const Tensor& factor,
                         const Tensor& norms, const Tensor& rank, const Tensor& scratch,
                         double rtol);

}  // namespace gradsurgery
