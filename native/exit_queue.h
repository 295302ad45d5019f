// Exits of vCPUs that run in threads of their own, on their way to the JavaScript thread.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "spin.h"
#include "support.h"

class VcpuThread;

class ExitQueue {
 public:
  ExitQueue(Napi::Env env, uv_loop_t* loop);
  ~ExitQueue() { close(); }
  void close();

  /** Called by a vCPU's thread. */
  void post(VcpuThread* thread);
  /** After this, the thread is not delivered any more. Called when it has been joined. */
  void forget(VcpuThread* thread);
  /** The event loop stays alive while a vCPU runs. */
  void runStarted();
  void runEnded();

 private:
  void deliver();

  Napi::Env env_;
  UvHandle<uv_async_t, UV_ASYNC> async_;
  std::mutex mutex_;
  std::vector<VcpuThread*> exited_;
  /** exited_.size(), to be looked at without the lock. */
  std::atomic<size_t> waiting_{0};
  /** The JavaScript thread looks for exits by itself: no need to wake it. */
  bool polling_ = false;
  AdaptiveSpin spin_;
  std::vector<VcpuThread*> delivering_;
  int running_ = 0;
};
