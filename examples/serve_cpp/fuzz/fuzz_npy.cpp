// libFuzzer target: whatever the bytes of a .npy file, they are an array that writes back as itself, or a Refusal.
#include <cstdlib>

#include "deploycc/npy.hpp"
#include "deploycc/refusal.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        const deploycc::Tensor tensor = deploycc::parse_npy(deploycc::Bytes(data, data + size), "fuzz");
        const deploycc::Tensor again = deploycc::parse_npy(deploycc::write_npy(tensor), "fuzz");
        if (again.shape != tensor.shape || again.data != tensor.data) std::abort();
        deploycc::to_doubles(tensor);
    } catch (const deploycc::Refusal&) {
    }
    return 0;
}
