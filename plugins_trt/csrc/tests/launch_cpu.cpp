// The launch on the CPU: pointers are host memory, and every item of the problem is computed at once.
#include "../dcnv3_launch.h"

namespace deploycc {

std::string launch(const Problem& problem, Type x, Type offset, Type mask, Tactic tactic, cudaStream_t) {
    const auto all = [&problem](auto instance) {
        for (std::int64_t item = 0; item < problem.items; ++item) {
            decltype(instance)::run(problem, item);
        }
    };
    return dispatch(problem, x, offset, mask, tactic, all) ? "" : "no kernel was compiled for these types";
}

}  // namespace deploycc
