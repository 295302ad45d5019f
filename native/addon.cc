#include "addon.h"

#include <cpuid.h>

#include "event_fd.h"
#include "file_io.h"
#include "guest_ram.h"
#include "inline_loop.h"
#include "kvm.h"
#include "support.h"
#include "timer_fd.h"
#include "vcpu.h"
#include "vcpu_thread.h"
#include "vm.h"

Addon& addonOf(Napi::Env env) { return *env.GetInstanceData<Addon>(); }

Addon::Addon(Napi::Env env, Napi::Object exports) : env_(env) {
  napi_get_uv_event_loop(env, &loop_);
  DefineAddon(exports, {InstanceMethod("setErrorFactory", &Addon::setErrorFactory),
                        InstanceMethod("hostCpuid", &Addon::hostCpuid)});
  exports.Set("Kvm", Kvm::define(env));
  vmClass = Napi::Persistent(Vm::define(env));
  vcpuClass = Napi::Persistent(Vcpu::define(env));
  exports.Set("GuestRam", GuestRam::define(env));
  exports.Set("EventFd", EventFd::define(env));
  exports.Set("TimerFd", TimerFd::define(env));
  exports.Set("InlineLoop", InlineLoop::define(env));
  exports.Set("VcpuThread", VcpuThread::define(env));
  exports.Set("fileIo", defineFileIo(env));
  // An environment can end in the middle of a run (a worker that is terminated, process.exit). Threads are then
  // joined and libuv handles closed before the loop goes; the close callbacks free the handles' memory.
  env.AddCleanupHook([this] { stopAll(); });
}

Addon::~Addon() = default;

void Addon::stopAll() {
  auto stoppables = stoppables_;
  for (auto* stoppable : stoppables) stoppable->stopForExit();
  if (sliceWatcher_) sliceWatcher_->stop();
  if (exitQueue_) exitQueue_->close();
}

ExitQueue& Addon::exitQueue() {
  if (!exitQueue_) exitQueue_ = std::make_unique<ExitQueue>(env_, loop_);
  return *exitQueue_;
}

SliceWatcher& Addon::sliceWatcher() {
  if (!sliceWatcher_) sliceWatcher_ = std::make_unique<SliceWatcher>(loop_);
  return *sliceWatcher_;
}

Napi::Value Addon::setErrorFactory(const Napi::CallbackInfo& info) {
  errorFactory_ = Napi::Persistent(info[0].As<Napi::Function>());
  return info.Env().Undefined();
}

Napi::Value Addon::hostCpuid(const Napi::CallbackInfo& info) {
  uint32_t registers[4] = {};
  __cpuid_count(uint32Of(info[0], "leaf"), uint32Of(info[1], "subleaf"), registers[0], registers[1], registers[2],
                registers[3]);
  auto result = Napi::Array::New(info.Env(), 4);
  for (uint32_t i = 0; i < 4; i++) result.Set(i, Napi::Number::New(info.Env(), registers[i]));
  return result;
}

NODE_API_ADDON(Addon)
