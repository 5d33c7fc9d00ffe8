// The launch of a DCNv3 problem, for callers that are compiled by a C++ compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "dcnv3_problem.h"

namespace deploycc {

// Run the kernel for these types on `stream`; return what went wrong, or nothing.
std::string launch(const Problem& problem, Type x, Type offset, Type mask, Tactic tactic, cudaStream_t stream);

}  // namespace deploycc
