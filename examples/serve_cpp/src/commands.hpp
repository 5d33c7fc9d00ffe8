#pragma once

#include <string>
#include <vector>

namespace deploycc {

// Run one command of the command line and return the exit code. Throws Refusal.
int run_command(const std::vector<std::string>& arguments);

}  // namespace deploycc
