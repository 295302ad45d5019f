#include "slice_watcher.h"

#include <csignal>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/timerfd.h>

#include "kick_signal.h"

namespace {
constexpr uint64_t kNanosecondsPerMillisecond = 1000000;
}

SliceWatcher::SliceWatcher(uv_loop_t* loop) : loop_(loop) {
  size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* page = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  control_ = std::make_shared<Mapping>(page == MAP_FAILED ? nullptr : page, size);
}

void SliceWatcher::start(Napi::Env env) {
  if (started_) return;
  if (kickSignal() < 0) throwErrno(env, "sigaction", EAGAIN);
  if (control_->data() == nullptr) throwErrno(env, "mmap", ENOMEM);
  timer_.reset(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!timer_.open()) throwErrno(env, "timerfd_create");
  wake_.reset(eventfd(0, EFD_CLOEXEC));
  if (!wake_.open()) throwErrno(env, "eventfd");
  loopThread_ = pthread_self();
  unblockKickSignal();
  ending_ = false;
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(
      &thread_, nullptr,
      [](void* self) -> void* {
        static_cast<SliceWatcher*>(self)->main();
        return nullptr;
      },
      this);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) throwErrno(env, "pthread_create", error);
  started_ = true;
}

void SliceWatcher::stop() {
  if (!started_) return;
  ending_ = true;
  armed_ = 0;
  uint64_t one = 1;
  if (write(wake_.get(), &one, sizeof one) == sizeof one) pthread_join(thread_, nullptr);
  started_ = false;
}

void SliceWatcher::setTimer(uint64_t nanoseconds) {
  itimerspec timer = {};
  timer.it_value.tv_sec = static_cast<time_t>(nanoseconds / (1000 * kNanosecondsPerMillisecond));
  timer.it_value.tv_nsec = static_cast<long>(nanoseconds % (1000 * kNanosecondsPerMillisecond));
  timerfd_settime(timer_.get(), 0, &timer, nullptr);
}

void SliceWatcher::arm(int timeout, bool watchLoop) {
  __atomic_store_n(leave(), 0, __ATOMIC_SEQ_CST);
  watchLoop_ = watchLoop;
  uint64_t nanoseconds = timeout < 0 ? 0 : static_cast<uint64_t>(timeout) * kNanosecondsPerMillisecond;
  deadline_ = timeout < 0 ? 0 : uv_hrtime() + nanoseconds;
  setTimer(nanoseconds);
  if (++slice_ == 0) slice_ = 1;
  armed_ = slice_;
  // Between two slices the helper mostly has not noticed that the first has ended: waking it costs more than that.
  if (sleeping_) {
    uint64_t one = 1;
    if (write(wake_.get(), &one, sizeof one) != sizeof one) leaveSlice();
  }
}

void SliceWatcher::limit(double milliseconds) {
  auto nanoseconds = static_cast<uint64_t>(milliseconds * static_cast<double>(kNanosecondsPerMillisecond));
  uint64_t end = uv_hrtime() + nanoseconds;
  if (deadline_ != 0 && deadline_ <= end) return;
  deadline_ = end;
  setTimer(nanoseconds);
}

bool SliceWatcher::target(std::shared_ptr<VcpuState> vcpu) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (vcpu) vcpu->clearExitRequest();
  target_ = std::move(vcpu);
  // The helper may have had its say before there was a vCPU to kick; it says it once a slice.
  return __atomic_load_n(leave(), __ATOMIC_SEQ_CST) == 0;
}

void SliceWatcher::leaveSlice() {
  // In this order: whoever sets the next target looks at the flag before entering the guest.
  __atomic_store_n(leave(), 1, __ATOMIC_SEQ_CST);
  std::lock_guard<std::mutex> lock(mutex_);
  if (target_ && !target_->closed) target_->requestExit();
  pthread_kill(loopThread_, kickSignal());
}

void SliceWatcher::main() {
  pthread_setname_np(pthread_self(), "nodevisor-loop");
  uint64_t ignored = 0;
  while (!ending_) {
    sleeping_ = true;
    if (armed_ == 0) {
      if (read(wake_.get(), &ignored, sizeof ignored) < 0 && errno != EINTR) return;
    }
    sleeping_ = false;
    for (uint32_t slice = armed_; slice != 0 && !ending_; slice = armed_) {
      pollfd watched[] = {
          {watchLoop_ ? uv_backend_fd(loop_) : -1, POLLIN, 0}, {timer_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
      if (poll(watched, 3, -1) < 0) continue;
      if (watched[2].revents != 0 && read(wake_.get(), &ignored, sizeof ignored) < 0) return;
      if ((watched[0].revents | watched[1].revents) == 0) continue;
      // Only if it is still the slice that was watched; between slices the loop looks after itself.
      if (armed_.compare_exchange_strong(slice, 0)) leaveSlice();
    }
  }
}
