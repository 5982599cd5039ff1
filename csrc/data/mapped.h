/// \file
/// Safe reads of memory-mapped files: if a file disappears, the SIGBUS becomes an exception.
#pragma once

#include <csetjmp>
#include <stdexcept>

namespace chatflow {

/// A mapped file could not be read, because its disk or server is gone or it was truncated.
class MappedReadError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace mapped {

/// Where this thread continues after a fault in mapped memory; null outside `guarded`.
extern thread_local sigjmp_buf* landing;

/// Installs the SIGBUS handler once per process. A fault outside `guarded` is passed to the
/// previous handler.
void install_handler();

/// Runs `body`, which reads mapped memory.
///
/// After a fault, the frames between the read and this function are not unwound. At every read,
/// `body` and the functions that it calls must therefore have no live objects with destructors.
/// Limit them to loads into local numbers and copies into memory that the caller owns.
/// \return whether everything could be read
template <typename Body>
bool guarded(const Body& body) {
  install_handler();
  sigjmp_buf here;
  sigjmp_buf* const outer = landing;
  // The signal mask is not saved, which would cost a system call. The handler does not block
  // SIGBUS.
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
