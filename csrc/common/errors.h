// Failures with a kind that the binding turns into the Python exception of the same name.
#pragma once

#include <stdexcept>
#include <string>

namespace moe_ep {

enum class ErrorKind { kConfig, kState, kUnavailable, kCapacity, kTimeout, kLost, kMismatch, kDevice };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace moe_ep
