// libFuzzer target: whatever the body of a request, it is a request whose inputs are whole, or a Refusal.
// The first two bytes say how much of the rest is JSON; 0xffff says that all of it is.
#include <cstdlib>
#include <string>

#include "deploycc/protocol.hpp"
#include "deploycc/refusal.hpp"

namespace {

constexpr const char* BUNDLE = R"({"schema":"deploycc.bundle/1","name":"net",
 "inputs":[{"name":"x","datatype":"FP32","shape":[-1,2],"minimum":[1,2],"optimum":[2,2],"maximum":[4,2]},
           {"name":"i","datatype":"INT8","shape":[-1],"minimum":[1],"optimum":[2],"maximum":[4]}],
 "outputs":[{"name":"y","datatype":"FP32","shape":[-1,1]}],"batch":{"minimum":1,"optimum":2,"maximum":4},
 "variants":[],"golden":{"inputs":{"x":"x.npy","i":"i.npy"}},"labels":null,
 "files":{"x.npy":{"sha256":"0000000000000000000000000000000000000000000000000000000000000000","bytes":1},
          "i.npy":{"sha256":"0000000000000000000000000000000000000000000000000000000000000000","bytes":1}}})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const deploycc::Bundle bundle = deploycc::parse_bundle(BUNDLE);
    if (size < 2) return 0;
    const std::size_t length = data[0] | (data[1] << 8);
    const std::string_view body(reinterpret_cast<const char*>(data) + 2, size - 2);
    try {
        deploycc::InferRequest request = deploycc::parse_request(body, length == 0xffff ? std::nullopt : std::optional(length), bundle);
        for (const deploycc::Tensor& input : request.inputs) {
            if (input.data.size() != deploycc::count(input.shape) * deploycc::size_of(input.type)) std::abort();
        }
        request.outputs = {"y"};
        deploycc::write_response(request, {deploycc::make_tensor("y", deploycc::DataType::FP32, {1, 1})}, bundle);
        deploycc::checked_inputs(bundle, std::move(request.inputs));
    } catch (const deploycc::Refusal&) {
    }
    return 0;
}
