// While the JavaScript thread is inside KVM_RUN its event loop stands still. This helper thread watches in its place:
// when the loop gets work (a timer is due, a socket is readable), it takes the JavaScript thread out of the guest.
#pragma once

#include <atomic>
#include <mutex>
#include <pthread.h>

#include "support.h"
#include "vcpu.h"

class SliceWatcher {
 public:
  explicit SliceWatcher(uv_loop_t* loop);
  ~SliceWatcher() { stop(); }
  /** Throws when the thread cannot be made. Called on the loop's own thread. */
  void start(Napi::Env env);
  void stop();

  /** A slice begins: it ends after `timeout` ms (-1: never by itself) and, with `watchLoop`, when the loop has work. */
  void arm(int timeout, bool watchLoop);
  /** The slice ends in `milliseconds` at the latest. */
  void limit(double milliseconds);
  void disarm() { armed_ = 0; }
  /** The vCPU that the slice runs, or null. False if the slice should be left without entering the guest. */
  bool target(std::shared_ptr<VcpuState> vcpu);

  /** One int32: 1 once the slice should be left. */
  std::shared_ptr<Mapping> control() const { return control_; }

 private:
  void main();
  void leaveSlice();
  void setTimer(uint64_t nanoseconds);
  int32_t* leave() const { return reinterpret_cast<int32_t*>(control_->data()); }

  uv_loop_t* loop_;
  std::shared_ptr<Mapping> control_;
  Fd timer_;
  Fd wake_;
  pthread_t loopThread_ = {};
  pthread_t thread_ = {};
  bool started_ = false;
  std::atomic<bool> ending_{false};
  /** The number of the slice under way, 0 between slices: a late helper must not end the next one. */
  std::atomic<uint32_t> armed_{0};
  uint32_t slice_ = 0;
  std::atomic<bool> watchLoop_{true};
  /** The helper waits for a slice, so it has to be woken for one. */
  std::atomic<bool> sleeping_{false};
  /** uv_hrtime() at which the slice ends by itself; 0 for never. */
  uint64_t deadline_ = 0;
  std::mutex mutex_;
  std::shared_ptr<VcpuState> target_;
};
