// The DCNv3 kernels for CUDA: one thread per item, a tail guard, and nothing else.
#include "dcnv3_launch.h"

namespace deploycc {
namespace {

constexpr int kThreads = 128;

// For kernels of unknown size ptxas would spill a register for one block more on a multiprocessor; for known ones its own choice (0) is right.
template <class Run>
constexpr int kFewestBlocks = Run::kKernel == 0 ? 4 : 0;

template <class Run>
__global__ void __launch_bounds__(kThreads, kFewestBlocks<Run>) dcnv3_kernel(const __grid_constant__ Problem problem) {
    const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (item < problem.items) {
        Run::run(problem, item);
    }
}

}  // namespace

std::string launch(const Problem& problem, Type x, Type offset, Type mask, Tactic tactic, cudaStream_t stream) {
    const std::int64_t blocks = (problem.items + kThreads - 1) / kThreads;
    if (blocks == 0) {
        return {};  // an empty batch
    }
    if (blocks > std::numeric_limits<std::int32_t>::max()) {
        return "the batch is too large for one launch";
    }
    const bool found = dispatch(problem, x, offset, mask, tactic, [&](auto instance) {
        dcnv3_kernel<decltype(instance)><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(problem);
    });
    if (!found) {
        return "no kernel was compiled for these types";
    }
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? std::string{} : std::string("the launch failed: ") + cudaGetErrorString(error);
}

}  // namespace deploycc
