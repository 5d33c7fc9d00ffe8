// The command line of the runner: verify, run, bench, serve.
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "commands.hpp"
#include "deploycc/refusal.hpp"

int main(int count, char** values) {
    try {
        return deploycc::run_command(std::vector<std::string>(values + 1, values + count));
    } catch (const deploycc::Refusal& refusal) {
        std::cerr << "error: " << refusal.what() << '\n';
        return refusal.exit_code();
    } catch (const std::exception& error) {
        std::cerr << "error: unforeseen: " << error.what() << '\n';
        return static_cast<int>(deploycc::Kind::contract);
    }
}
