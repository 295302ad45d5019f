// One addon per environment (main thread or worker): nothing but the kick signal is shared by environments.
#pragma once

#include <memory>
#include <napi.h>
#include <set>

#include "exit_queue.h"
#include "slice_watcher.h"

class VcpuThread;
class InlineLoop;
class EventFd;

/** What an addon must still stop when its environment ends while machines run. */
class Stoppable {
 public:
  virtual ~Stoppable() = default;
  /** Ends threads and closes libuv handles. May be called twice. */
  virtual void stopForExit() = 0;
};

class Addon : public Napi::Addon<Addon> {
 public:
  Addon(Napi::Env env, Napi::Object exports);
  ~Addon();

  Napi::FunctionReference& errorFactory() { return errorFactory_; }
  ExitQueue& exitQueue();
  SliceWatcher& sliceWatcher();
  uv_loop_t* loop() const { return loop_; }

  void add(Stoppable* stoppable) { stoppables_.insert(stoppable); }
  void remove(Stoppable* stoppable) { stoppables_.erase(stoppable); }

  Napi::FunctionReference vmClass;
  Napi::FunctionReference vcpuClass;

 private:
  Napi::Value setErrorFactory(const Napi::CallbackInfo& info);
  Napi::Value hostCpuid(const Napi::CallbackInfo& info);
  void stopAll();

  Napi::Env env_;
  uv_loop_t* loop_ = nullptr;
  Napi::FunctionReference errorFactory_;
  std::unique_ptr<ExitQueue> exitQueue_;
  std::unique_ptr<SliceWatcher> sliceWatcher_;
  std::set<Stoppable*> stoppables_;
};
