// Every error that the runner raises on purpose: what is wrong, where, and what to do about it.
#pragma once

#include <stdexcept>
#include <string>

namespace deploycc {

// The exit codes are those of the deploycc command.
enum class Kind { usage = 2, contract = 3, backend = 4 };

class Refusal : public std::runtime_error {
public:
    Refusal(Kind kind, const std::string& what, const std::string& at, const std::string& fix)
        : std::runtime_error(what + (at.empty() ? "." : ". Where: " + at + ".") + (fix.empty() ? "" : " Fix: " + fix + ".")), kind_(kind) {}

    Kind kind() const noexcept { return kind_; }
    int exit_code() const noexcept { return static_cast<int>(kind_); }

private:
    Kind kind_;
};

// Too much is asked at the moment; the same request may be met later.
class Busy : public Refusal {
public:
    using Refusal::Refusal;
};

}  // namespace deploycc
