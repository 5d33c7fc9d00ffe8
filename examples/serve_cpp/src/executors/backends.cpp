#include "backends.hpp"

namespace deploycc {

std::vector<std::unique_ptr<Backend>> backends() {
    std::vector<std::unique_ptr<Backend>> found;
#ifdef SERVE_TENSORRT
    found.push_back(tensorrt_backend());
#endif
#ifdef SERVE_ONNXRUNTIME
    found.push_back(onnxruntime_backend());
#endif
#ifdef SERVE_OPENCV
    found.push_back(opencv_backend());
#endif
    return found;
}

}  // namespace deploycc
