// The CUDA launch of a DCNv3 problem, for callers that are compiled by a C++ compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "dcnv3_problem.h"

namespace deploycc {

// Launch the kernel for these types on `stream`; return cudaErrorInvalidValue when there is none.
cudaError_t launch(const Problem& problem, Type x, Type offset, Type mask, Tactic tactic, cudaStream_t stream);

}  // namespace deploycc
