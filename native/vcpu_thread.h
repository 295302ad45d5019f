// A vCPU that runs on a thread of its own. The thread enters KVM_RUN when told to and posts every exit to the
// JavaScript thread, which handles it and tells the thread to go on.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <pthread.h>

#include "addon.h"
#include "spin.h"
#include "support.h"
#include "vcpu.h"

class VcpuThread : public Napi::ObjectWrap<VcpuThread>, public Stoppable {
 public:
  static Napi::Function define(Napi::Env env);
  explicit VcpuThread(const Napi::CallbackInfo& info);
  ~VcpuThread() override;

  void stopForExit() override { join(); }
  /** Called by the ExitQueue on the JavaScript thread. */
  void deliverExit();

 private:
  enum class Command { wait, run, end };

  Napi::Value resume(const Napi::CallbackInfo& info);
  Napi::Value kick(const Napi::CallbackInfo& info);
  Napi::Value stop(const Napi::CallbackInfo& info);
  void start(Napi::Env env);
  void order(Command command);
  void join();
  void main();

  std::shared_ptr<VcpuState> vcpu_;
  Addon* addon_;
  Napi::FunctionReference onExit_;
  pthread_t thread_ = {};
  bool started_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<Command> command_{Command::wait};
  AdaptiveSpin spin_;
  /** 0 or errno of the KVM_RUN that was posted. */
  int error_ = 0;
};
