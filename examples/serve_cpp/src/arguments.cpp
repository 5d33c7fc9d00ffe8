#include "arguments.hpp"

#include <algorithm>
#include <cstdlib>

#include "deploycc/refusal.hpp"

namespace deploycc {

std::string Arguments::text(const std::string& name, const std::string& otherwise) const {
    const auto found = options.find(name);
    return found == options.end() ? otherwise : found->second;
}

long Arguments::number(const std::string& name, long otherwise, long least, long most) const {
    const std::string given = text(name, std::to_string(otherwise));
    char* end = nullptr;
    const long value = std::strtol(given.c_str(), &end, 10);
    if (given.empty() || *end != '\0' || value < least || value > most) {
        throw Refusal(Kind::usage, "'" + given + "' is no number from " + std::to_string(least) + " to " + std::to_string(most), name, "give another");
    }
    return value;
}

Arguments parse_arguments(const std::vector<std::string>& words, const std::vector<std::string>& known) {
    Arguments found;
    found.command = words.empty() ? "" : words[0];
    for (std::size_t i = 1; i < words.size(); ++i) {
        if (words[i].rfind("--", 0) != 0) {
            if (!found.path.empty()) throw Refusal(Kind::usage, "'" + words[i] + "' is one argument too many", "", "give one bundle");
            found.path = words[i];
            continue;
        }
        if (std::find(known.begin(), known.end(), words[i]) == known.end()) {
            throw Refusal(Kind::usage, "the option '" + words[i] + "' is not known", found.command, "see --help");
        }
        if (i + 1 == words.size()) throw Refusal(Kind::usage, "the option '" + words[i] + "' has no value", found.command, "give one");
        const std::string &name = words[i], &value = words[++i];
        if (name != "--input") {
            found.options[name] = value;
        } else if (const std::size_t equals = value.find('='); equals != std::string::npos) {
            found.inputs.emplace_back(value.substr(0, equals), value.substr(equals + 1));
        } else {
            throw Refusal(Kind::usage, "'" + value + "' is not NAME=FILE", "--input", "write for example image=photo.npy");
        }
    }
    return found;
}

}  // namespace deploycc
