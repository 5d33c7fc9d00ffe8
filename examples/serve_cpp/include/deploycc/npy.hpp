// The .npy format, versions 1 to 3, for arrays of numbers in C order.
#pragma once

#include "deploycc/tensor.hpp"

namespace deploycc {

// Throws Refusal for anything but an array of a protocol type; Python objects are refused by name.
Tensor parse_npy(const Bytes& file, const std::string& name);
Bytes write_npy(const Tensor& tensor);

}  // namespace deploycc
