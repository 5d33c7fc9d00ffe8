// Runs the kernel body on the CPU. Reads cases from standard input and writes results to standard output, until the input ends:
//
//   in:  15 attributes (4 bytes each, in the order of Attributes::each), tactic, four types (x, offset, mask, y), has_center (int32);
//        five shapes of four int64 (x, offset, mask, center, y); the bytes of x, offset, mask (absent when record) and center (if any)
//   out: the length of an error text (int64) and the text, or -1 and the bytes of y
//
// Every operand lies in an allocation of its exact size, so that AddressSanitizer sees an access beyond it.
#include <cstdio>
#include <memory>
#include <type_traits>
#include <vector>

#include "../dcnv3_problem.h"

using namespace deploycc;

namespace {

bool take(void* to, std::size_t bytes) { return bytes == 0 || std::fread(to, 1, bytes, stdin) == bytes; }

void put(const void* from, std::size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

std::size_t bytes_of(const Operand& operand) {
    return static_cast<std::size_t>(operand.shape[0] * operand.shape[1] * operand.shape[2] * operand.shape[3]) * size_of(operand.type);
}

std::string run(const Attributes& attributes, Operand (&operands)[5], Tactic tactic) {
    Problem problem;
    auto& [x, offset, mask, center, y] = operands;
    if (auto error = make_problem(attributes, x, offset, mask, center, y, tactic, problem); !error.empty()) {
        return error;
    }
    const auto all = [&problem](auto instance) {
        for (std::int64_t item = 0; item < problem.items; ++item) {
            decltype(instance)::run(problem, item);
        }
    };
    return dispatch(problem, x.type, offset.type, mask.type, tactic, all) ? "" : "no kernel was compiled for this case";
}

bool next_case() {
    Attributes attributes;
    bool more = true;
    Attributes::each(attributes, [&more](const char*, auto& value) { more = more && take(&value, sizeof(value)); });
    std::int32_t tactic = 0, types[4] = {}, has_center = 0;
    if (!more || !take(&tactic, sizeof(tactic)) || !take(types, sizeof(types)) || !take(&has_center, sizeof(has_center))) {
        return false;
    }
    Operand operands[5];
    std::unique_ptr<char[]> memory[5];
    for (auto& operand : operands) {
        take(operand.shape, sizeof(operand.shape));
    }
    const int kinds[5] = {types[0], types[1], types[2], types[0], types[3]};
    for (int i = 0; i < 5; ++i) {
        operands[i].type = static_cast<Type>(kinds[i]);
        if ((i == 2 && attributes.record) || (i == 3 && !has_center)) {
            continue;
        }
        memory[i] = std::make_unique<char[]>(bytes_of(operands[i]));
        operands[i].data = memory[i].get();
        if (i < 4) {
            take(operands[i].data, bytes_of(operands[i]));
        }
    }
    if (attributes.record) {
        operands[2].data = operands[1].data;
    }
    const std::string error = run(attributes, operands, Tactic::of(tactic));
    const std::int64_t length = error.empty() ? -1 : static_cast<std::int64_t>(error.size());
    put(&length, sizeof(length));
    put(error.empty() ? operands[4].data : error.data(), error.empty() ? bytes_of(operands[4]) : error.size());
    std::fflush(stdout);
    return true;
}

}  // namespace

int main() {
    while (next_case()) {
    }
    return 0;
}
