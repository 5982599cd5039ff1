/// \file
/// Reads of memory-mapped files that may vanish: a fault becomes an exception.
#pragma once

#include <csetjmp>
#include <stdexcept>

namespace chatflow {

/// A mapped file could not be read: its disk or its server is gone, or it became shorter.
class MappedReadError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace mapped {

/// Where this thread goes on when a read of mapped memory faults; null outside `guarded`.
extern thread_local sigjmp_buf* landing;

/// Installs the handler of SIGBUS, once for the process. A fault outside `guarded` goes to the
/// handler that was there before.
void install_handler();

/// Runs `body`, which reads mapped memory.
///
/// Where the fault comes, nothing that has a destructor may be under construction in `body` or
/// below: between the fault and here no frame is unwound. Loads into locals that are numbers, and
/// copies into memory that the caller keeps, are what belongs in it.
/// \return whether all of it could be read
template <typename Body>
bool guarded(const Body& body) {
  install_handler();
  sigjmp_buf here;
  sigjmp_buf* const outer = landing;
  // Without the signal mask, which would cost a system call: the handler does not block its signal.
  if (sigsetjmp(here, 0) != 0) {
    landing = outer;
    return false;
  }
  landing = &here;
  struct Restore {
    sigjmp_buf* outer;
    ~Restore() { landing = outer; }
  } restore{outer};
  body();
  return true;
}

}  // namespace mapped
}  // namespace chatflow
