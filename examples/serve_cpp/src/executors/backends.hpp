// One function per executor; CMake compiles those whose headers it finds.
#pragma once

#include <memory>

#include "deploycc/executor.hpp"

namespace deploycc {

std::unique_ptr<Backend> tensorrt_backend();
std::unique_ptr<Backend> onnxruntime_backend();
std::unique_ptr<Backend> opencv_backend();

}  // namespace deploycc
