#include "mapped.h"

#include <signal.h>

#include <mutex>

namespace chatflow {
namespace mapped {

thread_local sigjmp_buf* landing = nullptr;

namespace {

struct sigaction previous;

void on_bus_error(int number, siginfo_t* info, void* context) {
  if (landing != nullptr) siglongjmp(*landing, 1);
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(number, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(number);
  } else {
    // When the handler returns, the read is repeated, and the fault then ends the process by
    // default.
    signal(SIGBUS, SIG_DFL);
  }
}

}  // namespace

void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action{};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  });
}

}  // namespace mapped
}  // namespace chatflow
