// Arguments of a command: one path, and options with values.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace deploycc {

struct Arguments {
    std::string command, path;
    std::map<std::string, std::string> options;
    std::vector<std::pair<std::string, std::string>> inputs;  // --input NAME=FILE, in order

    std::string text(const std::string& name, const std::string& otherwise) const;
    // Throws Refusal for anything but a number from `least` to `most`.
    long number(const std::string& name, long otherwise, long least, long most) const;
};

// Throws Refusal for an option that is not among `known`, or one without a value.
Arguments parse_arguments(const std::vector<std::string>& words, const std::vector<std::string>& known);

}  // namespace deploycc
