// The KServe v2 inference protocol: JSON bodies, and Triton's extension that appends tensors as raw bytes.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "deploycc/bundle.hpp"
#include "deploycc/tensor.hpp"

namespace deploycc {

struct InferRequest {
    std::string id;
    Tensors inputs;
    std::vector<std::string> outputs;   // wanted, in this order
    std::set<std::string> raw_outputs;  // of these, the ones wanted as bytes after the JSON
};

// A body, and the length of its JSON part when raw tensors follow it.
struct Body {
    std::string text;
    std::optional<std::size_t> json_length;
};

// Parse the body of an infer request. Throws Refusal with Kind::usage saying which part is wrong.
InferRequest parse_request(std::string_view body, std::optional<std::size_t> json_length, const Bundle& bundle);
Body write_response(const InferRequest& request, const Tensors& outputs, const Bundle& bundle);

// The largest body that a request for this model can sensibly have, in bytes.
std::size_t largest_body(const Bundle& bundle);

std::string server_metadata();
std::string model_metadata(const Bundle& bundle, const std::string& platform);
std::string error_body(const std::string& message);

}  // namespace deploycc
