#include "kick_signal.h"

#include <csignal>

namespace {

int install() {
  // The handler does nothing: that the signal arrives ends KVM_RUN with EINTR. SA_RESTART keeps other system calls
  // of the thread out of it.
  struct sigaction action = {};
  action.sa_handler = [](int) {};
  action.sa_flags = SA_RESTART;
  // From the end, since programs that use real-time signals take them from the start.
  for (int signal = SIGRTMAX; signal >= SIGRTMIN; signal--) {
    struct sigaction current = {};
    if (sigaction(signal, nullptr, &current) != 0 || current.sa_handler != SIG_DFL) continue;
    if (sigaction(signal, &action, nullptr) == 0) return signal;
  }
  return -1;
}

}  // namespace

int kickSignal() {
  static const int signal = install();
  return signal;
}

void unblockKickSignal() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, kickSignal());
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}
