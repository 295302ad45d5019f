#include "exit_queue.h"

#include <algorithm>

#include "vcpu_thread.h"

namespace {
/** How long exits are handled before the event loop gets its turn. */
constexpr uint64_t kTurnNanoseconds = 1000000;
}  // namespace

ExitQueue::ExitQueue(Napi::Env env, uv_loop_t* loop) : env_(env) {
  int error = uv_async_init(loop, async_.get(), [](uv_async_t* handle) {
    static_cast<ExitQueue*>(uv_handle_get_data(reinterpret_cast<uv_handle_t*>(handle)))->deliver();
  });
  if (error != 0) throwErrno(env, "uv_async_init", -error);
  async_.initialized(this);
  uv_unref(async_.base());
}

void ExitQueue::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  async_.close();
}

void ExitQueue::post(VcpuThread* thread) {
  std::lock_guard<std::mutex> lock(mutex_);
  exited_.push_back(thread);
  waiting_ = exited_.size();
  if (!polling_ && exited_.size() == 1 && async_.live()) uv_async_send(async_.get());
}

void ExitQueue::forget(VcpuThread* thread) {
  std::lock_guard<std::mutex> lock(mutex_);
  exited_.erase(std::remove(exited_.begin(), exited_.end(), thread), exited_.end());
  waiting_ = exited_.size();
  std::replace(delivering_.begin(), delivering_.end(), thread, static_cast<VcpuThread*>(nullptr));
}

void ExitQueue::runStarted() {
  if (running_++ == 0 && async_.live()) uv_ref(async_.base());
}

void ExitQueue::runEnded() {
  if (--running_ == 0 && async_.live()) uv_unref(async_.base());
}

void ExitQueue::deliver() {
  Napi::HandleScope scope(env_);
  uint64_t end = uv_hrtime() + kTurnNanoseconds;
  do {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      delivering_.swap(exited_);
      waiting_ = 0;
      polling_ = true;
    }
    Napi::HandleScope callScope(env_);
    // A callback may stop other threads: forget() then puts a null in their place.
    for (size_t i = 0; i < delivering_.size(); i++) {
      if (delivering_[i] != nullptr) delivering_[i]->deliverExit();
    }
    delivering_.clear();
  } while (running_ > 0 && uv_hrtime() < end && spin_.wait([this] { return waiting_ > 0; }));
  std::lock_guard<std::mutex> lock(mutex_);
  polling_ = false;
  if (!exited_.empty() && async_.live()) uv_async_send(async_.get());
}
